"""The events of a ledger that turn a stage's fate, apart from those that only tell how it goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ENDINGS = frozenset({"finished", "failed", "interrupted", "cancelled", "refused", "ended", "stopped"})
# Of these, those after which a stage may be tried again.
BAD = frozenset({"failed", "ended"})
_TURNS = ENDINGS | {"submitting", "submitted", "started", "retried", "anew"}


def last_turn(events: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The latest turn of one stage's events. However the last ranks of a cancelled job end, it is cancelled."""
    turn = None
    for event in events:
        cancelled = turn is not None and turn["event"] == "cancelled"
        if event["event"] in _TURNS and not (cancelled and event["event"] in ENDINGS):
            turn = event
    return turn
