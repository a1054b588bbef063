"""Spans of time as Slurm writes and reads them."""

from __future__ import annotations

import math


def seconds(text: str) -> float:
    """Seconds in MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; infinite for a word such as UNLIMITED."""
    if not text[:1].isdigit():
        return math.inf
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:  # MM, MM:SS
        parts.insert(0, 0)
    hours, minutes, rest = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def time_limit(text: str) -> int | None:
    """A job's time limit in seconds; None for no limit."""
    return int(seconds(text)) or None
