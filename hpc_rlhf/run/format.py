"""Format numbers, times and lists for tables and progress lines."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Such as 58 s, 4 min 10 s, 9 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(value: float | None) -> str:
    """Three significant digits; a dash for a missing or non-finite value."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(count: int) -> str:
    """A number of bytes."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def listed(words: Sequence[str]) -> str:
    """Such as: sft, reward and ppo."""
    return " and ".join([*filter(None, [", ".join(words[:-1])]), *words[-1:]])


def ago(seconds: float) -> str:
    """Such as: just now, 12 min ago, 3 h ago, 5 d ago. Negative times (clock skew) are just now."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length * (2 if unit == "d" else 1):
            return f"{int(seconds // length)} {unit} ago"
    return "just now"
