"""The trials of a search, in an append-only file: the values of each, then how it ended.

A trial's values are on disk before anything else of it exists, and its result before it decides the next values. So
whoever continues the search, after whatever stopped it, neither repeats nor loses a trial.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_rlhf.run.files import append_line
from hpc_rlhf.run.format import number
from hpc_rlhf.spec.metric import Metric

State = Literal["open", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Trial:
    """A trial.

    Attributes:
        name: its run's, and the folder of that.
        values: its value of each path that is searched, as JSON has them.
        metric: what the search improves.
        state: open until it has ended; done with a value of the metric, failed, or stopped early.
        value: of the metric, if it is done.
        why: the reason of a failure or an early stop; may be empty.
        step, at_step: the step at which it stopped early, and what it measured there by the metric of halving.
    """

    number: int
    name: str
    values: Mapping[str, Any]
    metric: str
    state: State = "open"
    value: float | None = None
    why: str = ""
    step: int | None = None
    at_step: float | None = None


def append(path: Path, trial: Trial) -> None:
    """Write down a new trial, or what became of one."""
    append_line(path, json.dumps(asdict(trial)))


def read(path: Path) -> list[Trial]:
    """The trials in order, each as it was last written; lines that a crash cut short are skipped."""
    trials: dict[int, Trial] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            trial = Trial(**json.loads(line))
        except (ValueError, TypeError):
            continue
        trials[trial.number] = trial
    return [trials[number] for number in sorted(trials)]


def best(trials: Sequence[Trial]) -> Trial | None:
    """The best trial; None if none is done."""
    done = {place: trial.value for place, trial in enumerate(trials) if trial.value is not None}
    if not done:
        return None
    choose = min if Metric.of(trials[0].metric).lower_is_better else max
    return trials[choose(done, key=lambda place: done[place])]


def describe(trials: Sequence[Trial]) -> str:
    """What has become of the trials, and which is the best."""
    counts = Counter(trial.state for trial in trials)
    words = f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items())
    first = best(trials)
    return words if first is None else f"{words}; the best {first.metric} is {number(first.value)}, of {first.name}"
