"""What is wrong with a spec's rewards, as far as this machine shows it without torch.

``check`` asks on a login node, and each stage asks again before it loads anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from hpc_rlhf.spec import model_files, reward_files
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.rewards import RewardItem

# Packages that a kind of reward needs, and the extra that installs it.
_PACKAGES = {"math": ("math_verify", "math"), "reasoning_gym": ("reasoning_gym", "gym")}


def problems(spec: JobSpec) -> Iterator[tuple[str, str, str | None]]:
    """For each problem the field of the spec, what is wrong and what to do."""
    for stage in spec.stage_names:
        # A container has packages and files of its own.
        yield from of_stage(spec, stage, here=spec.stage(stage).slurm.container is None)


def of_stage(spec: JobSpec, stage: str, here: bool = True) -> Iterator[tuple[str, str, str | None]]:
    """One stage's problems, each with its path in the spec, and a hint.

    Args:
        here: it runs with the packages and the files of this machine.
    """
    settings = spec.stage(stage)
    for place, item in enumerate(spec.rewards.get(stage, ())):
        for field, what, hint in _of_reward(item, here):
            yield ".".join(filter(None, ("stages", stage, "rewards", str(place), field))), what, hint
    margin, longest = getattr(settings, "overlong_margin", None), spec.data.max_answer_tokens
    if margin is not None and margin > longest:
        what = f"is {margin}, but responses have at most {longest} tokens (data.max_answer_tokens)"
        yield f"stages.{stage}.overlong_margin", what, "lower it; without it, it is a fifth of them"


def _of_reward(item: RewardItem, here: bool) -> Iterator[tuple[str, str, str | None]]:
    package, extra = _PACKAGES.get(item.kind, (None, None))
    if package is not None and here and find_spec(package) is None:
        yield "", f"needs the package {package}, which is not installed", f"pip install 'hpc-rlhf[{extra}]'"
    if item.function is not None:
        try:
            reward_files.needed_columns(item.function)
        except reward_files.FunctionError as error:
            what, hint = error.args
            yield "function", what, hint
    if here and item.image is not None and "://" not in item.image and not Path(item.image).exists():
        hint = f"apptainer build {item.image} docker://python:3.12-slim makes one; login and compute nodes must see it"
        yield "image", f"there is no image {item.image!r}", hint
    where = model_files.folder(item.own_model) if item.own_model is not None else None
    if where is None:
        return
    fields = model_files.config(where)
    if not model_files.is_classifier(fields):
        what = "it is no reward model: its configuration names no class for sequence classification"
        yield "model", what, None
    elif (count := model_files.labels(fields)) != 1:
        yield "model", model_files.not_one(count), "give a sequence classification model trained with one label"


def columns(spec: JobSpec) -> dict[str, set[str]]:
    """The columns of the data that each reward of a spec cannot do without, by the reward's field."""
    needed = {}
    for stage, rewards in spec.rewards.items():
        for place, item in enumerate(rewards):
            needed[f"stages.{stage}.rewards.{place}"] = _columns(item)
    return needed


def all_columns(spec: JobSpec) -> frozenset[str]:
    """The columns of the data that rewards of a spec read."""
    return frozenset().union(*columns(spec).values())


def _columns(item: RewardItem) -> set[str]:
    named = {column for column in (item.math, item.exact, item.code) if column is not None}
    with suppress(reward_files.FunctionError):  # ``problems`` has it
        named |= set() if item.function is None else reward_files.needed_columns(item.function)
    return named
