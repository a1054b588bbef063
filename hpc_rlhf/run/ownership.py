"""Refuses a run directory that somebody else could have put something into: ranks load pickles from it, which can run
any code."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import RunDir

_PICKLES = frozenset({".pkl", ".pt", ".bin"})


def check(run: RunDir, stage: str | None = None) -> None:
    """Look at the folders of a run, and at the files in them that are loaded as pickles.

    Args:
        run: its folder may be missing.
        stage: look at this stage only.

    Raises:
        HpcRlhfError: one belongs to another user, or is a folder that everybody may write to.
    """
    below = run.path if stage is None else run.stage(stage).path
    for path in (run.path, *_loaded(below)):
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue  # an attempt at work removes its temporary files
        if facts.st_uid != os.geteuid():
            raise HpcRlhfError(
                f"it belongs to another user (uid {facts.st_uid}), and what is in it could run as you",
                where=str(path),
                hint="choose a run_dir of your own; to go on from somebody's model, name its folder under models",
            )
        if stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_IWOTH:
            raise HpcRlhfError(
                "everybody may write to it, and what they put there could run as you",
                where=str(path),
                hint=f"see that all of it is yours, then: chmod o-w {path}",
            )


def _loaded(folder: Path) -> Iterator[Path]:
    for inside, _, files in os.walk(folder):
        yield Path(inside)
        yield from (Path(inside, name) for name in files if Path(name).suffix in _PICKLES)
