"""Whether a stage that ended badly is tried again, when and where, decided from what its ledger says. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_rlhf.run.failures import (
    BLAMELESS,
    FINAL,
    MORE_TIME,
    ON_A_NODE,
    STEP_TOO_LONG,
    TIME_LIMIT,
    Event,
    out_of_time_in_vain,
    returns,
)

_GROWS = 4
_LONGEST_WAIT = 3600
_TRIES = 2
_LATELY = 4  # endings


@dataclass(frozen=True)
class Again:
    """Try again.

    Attributes:
        delay: seconds to wait first.
        without: nodes not to use.
    """

    delay: int
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stop:
    """Leave it to a person; ``why`` in a sentence."""

    why: str


def decide(window: Sequence[Event], max_requeues: int, backoff: int) -> Again | Stop:
    """What to do about the last of a stage's endings.

    Args:
        window: the stage's events since a person last sent it off (`since_a_person`); the last ``ended`` is judged.
        max_requeues: how often a stage may come back.
        backoff: seconds to wait after the first attempt without progress.
    """
    endings = [event for event in window if event["event"] == "ended"]
    last = endings[-1]
    if last["reason"] in FINAL:
        return Stop(_sentence(last))
    if last["reason"] == TIME_LIMIT and out_of_time_in_vain(window) >= _TRIES:
        return Stop(f"{STEP_TOO_LONG}, the last one at step {last['step']}: {MORE_TIME}")
    blamed = [ending for ending in endings if ending["reason"] not in BLAMELESS]
    if last["reason"] not in BLAMELESS and len(blamed) > 1 and _same(blamed[-2], last):
        return Stop(_sentence(last, f"twice at step {last['step']}"))
    in_vain = [ending for ending in endings[len(endings) - _in_vain(endings) :] if ending in blamed]
    if last["reason"] not in BLAMELESS and len(in_vain) >= _TRIES:
        return Stop(
            f"two attempts in a row saved no new step; the last one ended at step {last['step']} by: {_sentence(last)}"
        )
    if returns(window) >= max_requeues:
        return Stop(
            f"it was requeued {returns(window)} times, all that slurm.max_requeues allows; the last attempt ended by: {_sentence(last)}"
        )
    tries = _in_vain(endings)
    delay = min(backoff * _GROWS ** (tries - 1), _LONGEST_WAIT) if tries else 0
    return Again(delay, _bad_nodes(endings))


def _in_vain(endings: Sequence[Event]) -> int:
    """How many attempts in a row have ended without progress."""
    count = 0
    for ending in reversed(endings):
        if ending["progress"]:
            break
        count += 1
    return count


def _same(one: Event, other: Event) -> bool:
    return all(one[key] == other[key] for key in ("reason", "step")) and _gist(one) == _gist(other)


def _gist(ending: Event) -> str:
    """A message without what differs from attempt to attempt: numbers, addresses, the node."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", ending["message"].replace(ending["node"] or "\0", ""))


def _bad_nodes(endings: Sequence[Event]) -> tuple[str, ...]:
    """Nodes on which attempts lately ended more than once, for a reason that may lie in the node.

    Lately: over a long run every node has its turn, and a stage that may use none of them does not start.
    """
    blamed = [ending["node"] for ending in endings if ending["reason"] in ON_A_NODE and ending["node"]]
    return tuple(sorted(node for node, times in Counter(blamed[-_LATELY:]).items() if times > 1))


def _sentence(ending: Event, when: str = "") -> str:
    how = f"{ending['reason']} {when}".strip()
    return f"{how}: {ending['message']}" if ending["message"] else how
