"""Compares a run after a storm with an undisturbed one, and its ledger with the faults; looks for processes left."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hpc_rlhf.run.events import Ended, Finished, Interrupted, Requeued, Resumed, Started
from hpc_rlhf.run.ledger import Ledger
from tests.cluster import ClusterError, wait_until
from tests.cluster.chain import Watched
from tests.cluster.processes import Process, find
from tests.storm.storm import Storm, Struck
from tests.train.stages import weights_digest


@dataclass(frozen=True)
class Interruption:
    """The end of an attempt that did not finish its stage.

    Attributes:
        attempt: the number of the stage's attempt, from 1.
        lost: steps done but not saved.
    """

    stage: str
    attempt: int
    reason: str
    message: str
    lost: int


def interruptions(chain: Watched, stage: str) -> list[Interruption]:
    """The interruptions in order; an attempt that left no event has an empty reason."""
    attempts: list[list[Any]] = []
    for event in Ledger(chain.run.ledger).events(stage):
        if isinstance(event, Started):
            attempts.append([])
        if attempts:
            attempts[-1].append(event)
    result = []
    for number, events in enumerate(attempts, 1):
        if any(isinstance(event, Finished) for event in events) or number == len(attempts):
            continue
        later = [event for events in attempts[number:] for event in events]
        name = events[0].attempt
        endings = [
            event
            for event in [*events, *(late for late in later if getattr(late, "attempt", None) == name)]
            if isinstance(event, Requeued | Ended | Interrupted) and getattr(event, "attempt", name) == name
        ]
        last = endings[-1] if endings else None
        resumed = next((event.step for event in later if isinstance(event, Resumed)), 0)
        lost = max(0, getattr(last, "step", 0) - resumed)
        result.append(
            Interruption(
                stage,
                number,
                getattr(last, "reason", "interrupted" if last else ""),
                getattr(last, "message", ""),
                lost,
            )
        )
    return result


def differences(chain: Watched, peace: Watched, stages: Sequence[str]) -> list[str]:
    """The differences from the undisturbed run."""
    wrong = []
    for stage in stages:
        if weights_digest(chain.run, stage) != weights_digest(peace.run, stage):
            wrong.append(f"{stage}: the weights differ")
        ours, theirs = _rows(chain, stage), _rows(peace, stage)
        if ours != theirs:
            steps = [row["step"] for row in ours]
            first = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
            at = f"first at {ours[first]} for {theirs[first]}" if first is not None else "one has more rows"
            wrong.append(f"{stage}: the metrics differ, {len(steps)} rows for {len(theirs)}, {at}")
    return wrong


def _rows(chain: Watched, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in chain.run.stage(stage).metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("time", "tokens_per_second")} for row in rows]


def unexplained(storm: Storm) -> list[str]:
    """Interruptions with a reason that no injected fault explains."""
    struck: dict[tuple[str, int], list[Struck]] = defaultdict(list)
    for each in storm.struck:
        struck[each.stage, each.attempt].append(each)
    wrong = []
    for stage in storm.stages:
        for ended in interruptions(storm.chain, stage):
            those = struck[stage, ended.attempt]
            if not any(ended.reason in each.reasons for each in those):
                names = ", ".join(each.fault for each in those) or "nothing"
                wrong.append(f"{stage} attempt {ended.attempt}: {ended.reason or 'no event'} "
                             f"({ended.message}), faults: {names}")  # fmt: skip
    return wrong


def still_running(storm: Storm) -> list[str]:
    """Processes of the chain's ranks that are left, such as a server."""
    mine, left = f"STORM={storm.folder}", list[Process]()

    def all_have_ended() -> bool:
        left[:] = find(lambda process: any(pair.startswith(mine) for pair in process.environ()))
        return not left

    with suppress(ClusterError):
        wait_until(all_have_ended, 120, "all processes have ended")
    return [f"still running: {process.pid} ({process.command()})" for process in left]


def table(storm: Storm) -> str:
    """A table of the faults: how many, how many interrupted a stage, and the steps lost."""
    ended = {(stage, each.attempt): each for stage in storm.stages for each in interruptions(storm.chain, stage)}
    lines = [f"{'fault':<40}{'injected':>9}{'interrupted':>13}{'steps lost':>12}{'most':>6}  reasons in the ledger"]
    for fault in sorted({each.fault for each in storm.struck}):
        those = [each for each in storm.struck if each.fault == fault]
        hits = [hit for each in those if (hit := ended.get((each.stage, each.attempt))) and hit.reason in each.reasons]
        reasons = Counter(hit.reason or "no event" for hit in hits)
        causes = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        lost: Sequence[int] = [hit.lost for hit in hits] or [0]
        lines.append(f"{fault:<40}{len(those):>8}{len(hits):>13}{sum(lost):>12}{max(lost):>6}  {causes}")
    lost = [each.lost for each in ended.values()]
    lines.append(f"{'all':<40}{len(storm.struck):>8}{len(ended):>13}{sum(lost):>12}{max(lost, default=0):>6}")
    return "\n".join(lines)
