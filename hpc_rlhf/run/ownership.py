"""Refuses a run directory that another user could change: its scripts are submitted, and its checkpoints loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hpc_rlhf import trust
from hpc_rlhf.run.layout import RunDir

_HINT = "choose your own run_dir; to start from another user's model, name its folder under models"


def check(run: RunDir, stage: str | None = None, shared: bool | None = None) -> None:
    """Check the files and folders of a run, and everything that leads to them.

    Args:
        run: its folder may be missing.
        stage: check only what a rank of this stage loads.
        shared: whether the run is shared with a group, which may then write to the folders above it; None if its
            own spec says so.

    Raises:
        HpcRlhfError: one belongs to another user than root, or others may write to it.
    """
    trust.check([run.path], _HINT, is_shared(run) if shared is None else shared, checked=stage is not None)
    # Where its group cannot enter, the modes of the files in it mean nothing to that group.
    is_closed = run.path.exists() and not run.path.stat().st_mode & 0o010
    for path in _files(run, stage):
        trust.check_one(path, _HINT, group_may_write=is_closed)
        if path.is_symlink():
            trust.check([path], _HINT, checked=stage is not None)


def is_shared(run: RunDir) -> bool:
    """Whether a run's spec shares it with its group. Loads no pydantic."""
    try:
        return "share: group" in run.job_yaml.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False


def _files(run: RunDir, stage: str | None) -> Iterator[Path]:
    folders = [run.path] if stage is None else [run.scripts, run.stage(stage).path]
    if stage is not None and run.path.is_dir():
        yield from (Path(entry.path) for entry in os.scandir(run.path))
    for folder in folders:
        for inside, below, files in os.walk(folder):
            yield from (Path(inside, name) for name in (*below, *files))
