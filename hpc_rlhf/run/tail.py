"""The end of a file that may be long."""

from __future__ import annotations

from pathlib import Path

_BYTES = 1 << 16


def read_tail(path: Path) -> str:
    """The last 64 KiB of a text file, which may begin in the middle of a line; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
