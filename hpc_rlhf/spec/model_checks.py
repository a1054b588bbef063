"""What is wrong with a spec's models, as far as their files are on this machine.

``check`` asks on a login node, and each stage asks again before it loads anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc_rlhf.spec import model_files, sequence_checks, tensor_checks, tokens
from hpc_rlhf.spec.job import FromScratch, JobSpec
from hpc_rlhf.spec.stages import kind_of
from hpc_rlhf.spec.stages.policy import PolicySpec


def problems(spec: JobSpec) -> Iterator[tuple[str, str, str | None]]:
    """For each problem the field of the spec, what is wrong and what to do."""
    places = {name: model_files.folder(ref) for name, ref in spec.models if isinstance(ref, str)}
    folders = {name: where for name, where in places.items() if where is not None}
    configs: dict[str, Mapping[str, Any]] = {name: model_files.config(where) for name, where in folders.items()}
    configs |= {name: ref.from_scratch for name, ref in spec.models if isinstance(ref, FromScratch)}
    refused = set()
    for name, fields in configs.items():
        if problem := _of_model(spec, name, fields, folders.get(name)):
            refused.add(name)
            yield f"models.{name}", *problem
    yield from _recomputing(spec, configs)
    yield from sequence_checks.problems(spec, configs)
    yield from tensor_checks.problems(spec, configs)
    yield from _too_many_stages(spec, configs.get("actor", {}))
    for stage in spec.stage_names:
        missing = set(kind_of(stage).requires) - spec.stage(stage).unneeded - set(spec.stage_names)
        if missing and spec.finished_reward is None:
            yield (
                f"stages.{stage}",
                f"needs the {missing.pop()} stage, or a finished reward model in models.reward",
                None,
            )
    if spec.uses_reward_model and {"actor", "reward"} <= folders.keys() - refused:
        actor, reward = tokens.read(folders["actor"]), tokens.read(folders["reward"])
        difference = actor.difference(reward) if actor and reward else None
        if difference is not None:
            yield "models.reward", f"its tokenizer differs from the actor's: {difference}", tokens.HINT


def _recomputing(spec: JobSpec, configs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Models that cannot recompute what the spec asks for."""
    scored = "actor" if spec.models.reward is None else "reward"
    for stage in spec.stage_names:
        strategies = spec.stage(stage).strategies
        roles = {"": scored if stage == spec.judge else "actor", "critic": scored}
        for role, name in roles.items():
            kind = model_files.model_type(configs.get(name, {}))
            refusals = {
                "activation_checkpointing": (
                    kind in model_files.NO_CHECKPOINTING,
                    "{} models cannot recompute activations",
                ),
                "chunked_mlp": (
                    kind is not None and kind not in model_files.CHUNKED_MLP,
                    "the MLPs of {} models cannot take a pass part by part",
                ),
            }
            for field, (is_refused, what) in refusals.items():
                if is_refused and getattr(strategies.get(role), field, False):
                    path = ".".join(filter(None, ("stages", stage, role, field)))
                    yield path, what.format(kind), f"set {field}: false"


def _too_many_stages(spec: JobSpec, actor: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Pipelines with more stages than the model has layers."""
    layers = next((actor[name] for name in ("num_hidden_layers", "n_layer") if isinstance(actor.get(name), int)), None)
    for name in spec.stage_names:
        stages = spec.stage(name).pipeline_stages
        if layers is not None and stages > layers:
            what = f"the model's {layers} layers cannot be divided into {stages} stages"
            yield f"stages.{name}.pipeline_parallel", what, f"use at most {layers}"


def _of_model(spec: JobSpec, name: str, fields: Mapping[str, Any], where: Path | None) -> model_files.Problem | None:
    if problem := model_files.untrainable(fields):
        return problem
    if name == "actor":
        if model_files.is_classifier(fields):
            return "it is a reward model, not a language model", "give the language model that it was made of"
        limit, longest = model_files.rotary_switch(fields), spec.data.max_prompt_tokens + spec.data.max_answer_tokens
        samples = any(isinstance(spec.stage(stage), PolicySpec) for stage in spec.stage_names)
        if samples and limit is not None and longest > limit:
            return model_files.switches_within(limit, longest)
        return None
    if not spec.uses_reward_model or where is None:
        return None
    try:
        head = model_files.score_head(where)
    except model_files.HeadError as error:
        return str(error), model_files.HEADS
    needy = [stage for stage in spec.stage_names if set(kind_of(stage).requires) - spec.stage(stage).unneeded]
    if head is None and model_files.shows_heads(where) and needy and spec.judge is None:
        return f"it has no score head, but {needy[0]} needs a finished reward model", "add the reward stage"
    return None
