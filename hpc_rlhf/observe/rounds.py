"""The rounds of training that lead to a run, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.results import Interval, read_report
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import rounds
from hpc_rlhf.spec.stages import BASE


@dataclass(frozen=True)
class Round:
    """A round, and how its last model does against the one that it started from.

    Attributes:
        number: from 1 on.
        run: the name of its folder.
        model: the last that it trained.
        against: what the evaluation compares its models with.
        win_rate: None if no reward model judged them.
    """

    number: int
    run: str
    model: str
    against: str
    win_rate: Interval | None


def read_rounds(spec: JobSpec) -> Iterator[Round]:
    """The rounds up to a run, the first one first.

    Args:
        spec: of the run.
    """
    for number, each in enumerate(rounds(spec), 1):
        run = RunDir(Path(each.run_dir))
        try:
            metrics = read_report(run)["models"].get(each.trained[-1], {})
        except HpcRlhfError:  # it is not evaluated
            metrics = {}
        yield Round(number, run.path.name, each.trained[-1], opponent(each), metrics.get("win_rate"))


def opponent(spec: JobSpec) -> str:
    """What a run's evaluation compares its models with, in words."""
    if BASE.name in spec.trained:
        return BASE.name
    for earlier in reversed(rounds(spec)[:-1]):
        for model, stage in earlier.policies.items():
            if spec.models.actor == str(RunDir(Path(earlier.run_dir)).stage(stage).policy(model)):
                return f"{model} of {Path(earlier.run_dir).name}"
    return "the start"
