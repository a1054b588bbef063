"""What is wrong with a spec's rewards, as far as this machine shows it without torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from hpc_rlhf.spec import model_files, reward_files
from hpc_rlhf.spec.job import JobSpec

# Packages that a kind of reward needs, and the extra that installs it.
_PACKAGES = {"math": ("math_verify", "math"), "reasoning_gym": ("reasoning_gym", "gym")}


def problems(spec: JobSpec) -> Iterator[tuple[str, str, str | None]]:
    """For each problem the field of the spec, what is wrong and what to do."""
    for stage in spec.stage_names:
        settings = spec.stage(stage)
        for place, item in enumerate(getattr(settings, "rewards", None) or ()):
            package, extra = _PACKAGES.get(item.kind, (None, None))
            # A container has packages of its own.
            if package is not None and settings.slurm.container is None and find_spec(package) is None:
                what = f"needs the package {package}, which is not installed"
                yield f"stages.{stage}.rewards.{place}", what, f"pip install 'hpc-rlhf[{extra}]'"
            if item.function is not None:
                try:
                    reward_files.needed_columns(item.function)
                except ValueError as error:
                    yield f"stages.{stage}.rewards.{place}.function", str(error), None
            where = model_files.folder(item.model) if item.model not in (None, "reward") else None
            if where is not None and not model_files.is_classifier(model_files.config(where)):
                what = "it is no reward model: its configuration names no class for sequence classification"
                yield f"stages.{stage}.rewards.{place}.model", what, None


def columns(spec: JobSpec) -> dict[str, set[str]]:
    """The columns of the data that each reward of a spec cannot do without, by the reward's field."""
    needed = {}
    for stage in spec.stage_names:
        for place, item in enumerate(getattr(spec.stage(stage), "rewards", None) or ()):
            named = {column for column in (item.math, item.exact, item.code) if column is not None}
            parameters = set() if item.function is None else reward_files.needed_columns(item.function)
            needed[f"stages.{stage}.rewards.{place}"] = named | parameters
    return needed
