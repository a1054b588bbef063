"""Ledger events by the names that they have on disk."""

from __future__ import annotations

from typing import Any

from hpc_rlhf.run.events import Event, from_json


def event(name: str, **facts: Any) -> Event:
    made = from_json({"event": name, **facts})
    assert made is not None, name
    return made
