"""Decides from its history whether a stage gets another attempt, when and where. Pure functions.

Healing and local runs ask once the end of the last attempt has been judged; an attempt that stops by itself asks
before it requeues its job. Two cases do not come here: Slurm requeues a job by itself after a preemption or a lost
node, and the batch script (``templates/stage.sbatch.j2``) if SIGTERM kills a rank before it is blocked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import takewhile

from hpc_rlhf.run.events import Ended, Requeued
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.reasons import BLAMELESS, FINAL, NO_NODES_LEFT, ON_A_NODE, STOPPED_EARLY, TIME_LIMIT, USER_ERROR

_GROWTH = 4
_LONGEST_DELAY = 3600
_TRIES = 2
_RECENT = 4  # endings
_MORE_TIME = "raise slurm.time, or make a step shorter: a smaller global batch, shorter responses, or more GPUs"


class StopKind(Enum):
    """Why there is no other attempt."""

    USER_ERROR = auto()
    EARLY = auto()  # a trial of a search that is worse than others: nothing for the user to do
    FINAL = auto()  # cancelled, or past its deadline
    TIME_LIMIT_WITHOUT_PROGRESS = auto()
    SAME_FAILURE_TWICE = auto()
    NO_PROGRESS = auto()
    BUDGET_SPENT = auto()
    REFUSED = auto()  # by sbatch
    HEALING_DISABLED = auto()


_FINAL_KINDS = {USER_ERROR: StopKind.USER_ERROR, STOPPED_EARLY: StopKind.EARLY}


@dataclass(frozen=True)
class Retry:
    """Try again after ``delay`` seconds, and not on the nodes in ``without``."""

    delay: int = 0
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stop:
    """Leave the stage to the user, with a hint where the reason alone does not show what helps."""

    kind: StopKind
    why: str
    hint: str = ""

    @property
    def message(self) -> str:
        return f"{self.why}: {self.hint}" if self.hint else self.why


def decide(window: StageHistory, max_requeues: int, backoff: int = 0, stopping: Requeued | None = None) -> Retry | Stop:
    """Whether a stage gets another attempt.

    Args:
        window: the stage's events since the user last submitted it (`StageHistory.since_user`).
        max_requeues: how often a stage may be requeued.
        backoff: seconds to wait after the first attempt without progress.
        stopping: how the attempt that asks is about to end; without it the last ``ended`` of the window is judged.
    """
    endings = window.all(Ended)
    last = stopping or endings[-1]
    without_progress = list(takewhile(lambda ending: not ending.progress, reversed(endings)))  # since the last progress
    if last.reason in FINAL:
        return Stop(_FINAL_KINDS.get(last.reason, StopKind.FINAL), _sentence(last))
    if last.reason == TIME_LIMIT:
        events = [*window.events, stopping] if stopping else window.events
        if StageHistory(events).timeouts_without_progress >= _TRIES:
            return Stop(
                StopKind.TIME_LIMIT_WITHOUT_PROGRESS,
                "two attempts in a row hit the time limit before they could save anything new, the last one "
                f"at step {last.step}",
                _MORE_TIME,
            )
    if isinstance(last, Ended) and last.reason not in BLAMELESS:
        blamed = [ending for ending in endings if ending.reason not in BLAMELESS]
        # A long step may take several attempts, each of which saves a part of it by the time limit.
        if last.reason != TIME_LIMIT and len(blamed) > 1 and _gist(blamed[-2]) == _gist(last):
            return Stop(StopKind.SAME_FAILURE_TWICE, _sentence(last, f"twice at step {last.step}"))
        if sum(ending.reason not in BLAMELESS for ending in without_progress) >= _TRIES:
            return Stop(
                StopKind.NO_PROGRESS,
                f"two attempts in a row saved no new step; the last one ended at step {last.step} by: "
                f"{_sentence(last)}",
            )
    if window.requeues >= max_requeues:
        return Stop(
            StopKind.BUDGET_SPENT,
            f"it was requeued {window.requeues} times, all that slurm.max_requeues allows; the last attempt "
            f"ended by: {_sentence(last)}",
        )
    delay = min(backoff * _GROWTH ** (len(without_progress) - 1), _LONGEST_DELAY) if without_progress else 0
    return Retry(delay, _bad_nodes(endings))


def _gist(ending: Ended) -> tuple[str, int, str]:
    """What the same failure has in common: the message without numbers, addresses and the node."""
    message = ending.message.replace(ending.node or "\0", "")
    return ending.reason, ending.step, re.sub(r"0x[0-9a-f]+|\d+", "#", message)


def _bad_nodes(endings: Sequence[Ended]) -> tuple[str, ...]:
    """Nodes on which recent attempts ended more than once, for a reason that may lie in the node.

    Only recent ones: over a long run every node fails eventually, and a stage that excludes all nodes never starts.
    None if Slurm has just found no node left.
    """
    if endings[-1:] and endings[-1].reason == NO_NODES_LEFT:
        return ()
    blamed = [ending.node for ending in endings if ending.reason in ON_A_NODE and ending.node]
    return tuple(sorted(node for node, times in Counter(blamed[-_RECENT:]).items() if times > 1))


def _sentence(ending: Ended | Requeued, when: str = "") -> str:
    how = f"{ending.reason} {when}".strip()
    message = ending.message if isinstance(ending, Ended) else ""
    return f"{how}: {message}" if message else how
