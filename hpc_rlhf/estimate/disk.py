"""Disk space of a run, roughly: its checkpoints and the models that it makes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.model_memory import ITEM
from hpc_rlhf.estimate.parameters import architecture
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.hub import HubItem
from hpc_rlhf.spec.job import FromScratch, JobSpec, ModelsSpec
from hpc_rlhf.spec.stages import kind_of
from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.spec.stages.recipes import billions_in
from hpc_rlhf.spec.training import StageSpec, TrainingSpec

# Bytes of a weight in a checkpoint: itself and Adam's two moments, each in float32.
_TRAINED = 12
# Bytes per weight in a moving average. It averages whole weights, even where only adapters are trained.
_AVERAGED = 4
# Adapters are a small share of the weights; even rank 128 has less than this in a large model.
_ADAPTERS = 0.05


def run_bytes(spec: JobSpec, stages: Collection[str] | None = None) -> int | None:
    """Bytes that a run's stages, by default all, keep on disk at a time; None if the size of a model is unknown."""
    actor, reward = _parameters(spec.models, "actor"), _parameters(spec.models, "reward")
    if actor is None or reward is None:
        return None
    total = 0.0
    for name in spec.trained:
        if stages is not None and name not in stages:
            continue
        stage = spec.stage(name)
        assert isinstance(stage, TrainingSpec)
        trained = reward if kind_of(name).makes == "reward model" else actor
        checkpoint = trained * _TRAINED * _share(stage)
        if "critic" in stage.strategies:
            checkpoint += reward * _TRAINED * _share(stage.strategies["critic"])
        if getattr(stage, "ema", False):
            checkpoint += trained * _AVERAGED
        if stage.keep_best is not None:  # a checkpoint has the best weights, too
            checkpoint += trained * (ITEM[stage.precision] * _share(stage) + _AVERAGED * getattr(stage, "ema", False))
        if isinstance(stage, PolicySpec) and stage.rollout.overlap:  # and those that the next rollout is drawn with
            checkpoint += trained * ITEM[stage.precision] * _share(stage)
        exported = trained * ITEM[stage.precision] * (2 if getattr(stage, "ema", False) else 1)
        total += (stage.keep_checkpoints + 1) * checkpoint + exported
    return int(total)


def _share(stage: StageSpec) -> float:
    """The share of its weights that a stage trains."""
    lora = getattr(stage, "lora", None)
    return _ADAPTERS if lora is not None and lora.only else 1.0


def _parameters(models: ModelsSpec, role: str) -> float | None:
    """A model's parameters, from its configuration, its files (assuming 16-bit weights) or its name."""
    try:
        return architecture(models, role).parameters
    except HpcRlhfError:
        pass
    ref = getattr(models, role) or models.actor
    if isinstance(ref, FromScratch):
        return None
    if Path(ref).is_absolute():
        size = sum(file.stat().st_size for file in Path(ref).glob("*.safetensors"))
    else:
        files = hub.recorded(HubItem("model", ref, ""))
        size = sum(bytes_ for name, bytes_ in files.items() if name.endswith((".safetensors", ".bin")))
    billions = billions_in(Path(ref).name)
    return size / 2 if size else None if billions is None else billions * 1e9
