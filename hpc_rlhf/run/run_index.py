"""The run directories that this user submitted or ran, so that `hpc-rlhf list` finds them anywhere."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def remember(run_dir: Path) -> None:
    """Record a run directory. Never fails, because the run matters more."""
    with suppress(OSError):
        if run_dir in known():
            return
        index = _index()
        index.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with index.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{run_dir}\n")


def known() -> list[Path]:
    """The recorded run directories, oldest first; some may be gone."""
    try:
        text = _index().read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    return [Path(line) for line in dict.fromkeys(text.split("\n")) if line]


def _index() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "hpc-rlhf" / "runs"
