"""Refuses a run directory into which another user could have written: ranks load pickles from it, which can
run any code."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import RunDir

_PICKLES = frozenset({".pkl", ".pt", ".bin"})


def check(run: RunDir, stage: str | None = None) -> None:
    """Check the folders of a run, and the files in them that are loaded as pickles.

    Args:
        run: its folder may be missing.
        stage: check only this stage.

    Raises:
        HpcRlhfError: one belongs to another user, or is a world-writable folder.
    """
    below = run.path if stage is None else run.stage(stage).path
    for path in (run.path, *_loaded(below)):
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue  # a running attempt removes its temporary files
        if facts.st_uid != os.geteuid():
            raise HpcRlhfError(
                f"it belongs to another user (uid {facts.st_uid}), and what is in it could run as you",
                where=str(path),
                hint="choose your own run_dir; to start from another user's model, name its folder under models",
            )
        if stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_IWOTH:
            raise HpcRlhfError(
                "it is world-writable, and what others put there could run as you",
                where=str(path),
                hint=f"check that everything in it is yours, then: chmod o-w {path}",
            )


def _loaded(folder: Path) -> Iterator[Path]:
    for inside, _, files in os.walk(folder):
        yield Path(inside)
        yield from (Path(inside, name) for name in files if Path(name).suffix in _PICKLES)
