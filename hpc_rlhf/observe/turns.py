"""The events of a ledger that turn a stage's fate, apart from those that only tell how it goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ENDINGS = frozenset({"finished", "failed", "interrupted", "cancelled", "refused"})
_TURNS = ENDINGS | {"submitting", "submitted", "started"}


def last_turn(events: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The latest turn of one stage's events. What a cancelled job still writes while it saves is none."""
    turn = None
    for event in events:
        if event["event"] in _TURNS:
            turn = event
    return turn
