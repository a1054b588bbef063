"""What the result of a stage depends on: the part of a spec that is the same for runs that can share the stage."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from hpc_rlhf.spec import reward_files
from hpc_rlhf.spec.cluster import SIZE
from hpc_rlhf.spec.job import FromScratch, JobSpec
from hpc_rlhf.spec.stages import EVALUATION, Data, kind_of


def inputs(spec: JobSpec, stage: str) -> dict[str, Any]:
    """Everything that affects the result of a stage, in the form of the spec, as plain values."""
    spec = reward_files.by_content(spec)
    stages = with_needs(spec, stage)
    models = {model for name in stages for model in kind_of(name).models}
    facts: dict[str, Any] = {
        "seed": spec.seed,
        "models": spec.models.model_dump(mode="json", include=models),
        "stages": {name: _settings(spec, name) for name in stages},
    }
    # The tokenizer of a model from scratch is trained on all data.
    from_data = isinstance(spec.models.actor, FromScratch) or any(kind_of(n).data is not Data.DOCUMENTS for n in stages)
    if from_data:
        facts["data"] = spec.data.model_dump(mode="json")
        facts["trained"] = list(spec.trained)  # the prompts are divided among them
    if spec.follows is not None and stage == EVALUATION.name:
        facts["follows"] = spec.follows  # it asks that run's prompts
    return facts


def fingerprint(spec: JobSpec, stage: str) -> str:
    """A hash of everything that affects the result of a stage: equal for runs that can share it."""
    return sha256(json.dumps({"stage": stage, **inputs(spec, stage)}, sort_keys=True).encode()).hexdigest()


def with_needs(spec: JobSpec, stage: str) -> tuple[str, ...]:
    """A stage and all stages that it starts from, directly or not, in the order of the run."""
    needs = {each for need in spec.needs(stage) for each in with_needs(spec, need)}
    return tuple(name for name in spec.stage_names if name == stage or name in needs)


def _settings(spec: JobSpec, stage: str) -> dict[str, Any]:
    settings = spec.stage(stage)
    size = settings.slurm.model_dump(mode="json", include=set(SIZE))
    return {**settings.model_dump(mode="json", exclude={"slurm"}), "slurm": size}
