"""Successive halving: whether a trial of a search goes on after an evaluation while it trains.

Asynchronous, as in arXiv 1810.05934: a trial compares itself with those that have come as far before it, and waits for
no other. Its rungs are its evaluations number 1, 2, 4 and so on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from hpc_rlhf import trust
from hpc_rlhf.errors import STOPPED_EARLY, HpcRlhfError
from hpc_rlhf.run.events import Ended, Failed
from hpc_rlhf.run.format import number
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.metric import Metric


def stop_if_worse(
    run: RunDir, stage: str, evaluation: int, step: int, total: int, values: Mapping[str, float | None]
) -> None:
    """End a trial that is not among the better half of those that have come as far.

    Args:
        evaluation: number of this one, from 1.
        step, total: steps done, and steps of the stage; trials with other numbers do not compare.
        values: what was measured.

    Raises:
        HpcRlhfError: with the exit code STOPPED_EARLY.
    """
    metric, names = _search_of(run)
    if metric is None or run.path.name not in names or evaluation & (evaluation - 1):
        return
    by = Metric.of(metric)
    if by.stage != stage:
        return
    value = values.get(by.name)
    others = [measured(run.sweep.run(name), by).get((step, total)) for name in names if name != run.path.name]
    known = [other for other in others if other is not None]
    if value is None or not math.isfinite(value):
        raise HpcRlhfError(f"{metric} is not finite at step {step}", exit_code=STOPPED_EARLY)
    better = sum(other < value if by.lower_is_better else other > value for other in known)
    if better >= math.ceil((len(known) + 1) / 2):
        raise HpcRlhfError(
            f"{better} of {len(known)} other trials had a better {metric} than {number(value)} at step {step}",
            exit_code=STOPPED_EARLY,
        )


def _search_of(run: RunDir) -> tuple[str | None, list[str]]:
    """The metric by which trials of a run's search stop early, and their names; None if it is of no such search, or
    another user wrote that file."""
    try:
        trust.check_one(run.sweep.json, "")
        return run.sweep.halving()
    except HpcRlhfError:
        return None, []


def why_stopped(run: RunDir, stage: str) -> str | None:
    """Why the latest attempt of a stage ended early; None if it did not."""
    history = StageHistory.read(run, stage)
    cause = history.attempt.first_cause
    ended = isinstance(history.state, Failed | Ended)
    return cause.message if ended and cause is not None and cause.exit_code == STOPPED_EARLY else None


def measured(run: RunDir, metric: Metric) -> dict[tuple[int, int], float]:
    """What a stage has measured on held-out data, by its steps done and in all, the latest last."""
    values = {}
    try:
        lines = run.stage(metric.stage).metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            if row["kind"] == "eval" and row[metric.name] is not None:
                values[int(row["step"]), int(row["total_steps"])] = float(row[metric.name])
        except (ValueError, LookupError, TypeError):
            continue  # another rank may be writing it
    return values
