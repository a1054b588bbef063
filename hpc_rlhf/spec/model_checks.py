"""What is wrong with a spec's models, as far as their files are on this machine.

``check`` asks on a login node, and each attempt of a stage before it loads anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpc_rlhf.spec import model_files, tokens
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.stages import kind_of


def problems(spec: JobSpec) -> Iterator[tuple[str, str, str | None]]:
    """For each problem the field of the spec, what is wrong and what to do."""
    found = {name: model_files.folder(ref) for name, ref in spec.models if isinstance(ref, str)}
    folders = {name: where for name, where in found.items() if where is not None}
    refused = set()
    for name, where in folders.items():
        if problem := _of_model(spec, name, where):
            refused.add(name)
            yield f"models.{name}", *problem
    for stage in spec.stage_names:
        missing = set(kind_of(stage).requires) - set(spec.stage_names)
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


def _of_model(spec: JobSpec, name: str, where: Path) -> model_files.Problem | None:
    fields = model_files.config(where)
    if problem := model_files.untrainable(fields):
        return problem
    if name == "actor":
        if model_files.is_classifier(fields):
            return "it is a reward model, not a language model", "give the language model that it was made of"
        return None
    if not spec.uses_reward_model:
        return None
    try:
        head = model_files.score_head(where)
    except model_files.HeadError as error:
        return str(error), model_files.HEADS
    needy = [stage for stage in spec.stage_names if kind_of(stage).requires]
    if head is None and fields and needy and spec.judge is None:
        return f"it is no reward model, which {needy[0]} needs: it has no score head", "add the reward stage"
    return None
