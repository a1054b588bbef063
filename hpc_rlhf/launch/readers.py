"""Who may read a run directory: its owner, or with `share: group` its group as well."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec

_SECRET = (".secret", ".token")  # names and suffixes of files that only the owner may read


@contextmanager
def group_may_read(spec: JobSpec) -> Iterator[None]:
    """Within it, the group may read what this process writes in a shared run, and what processes and jobs write that it
    starts: Slurm gives a job's log the umask of its submission."""
    if spec.share != "group":
        yield
        return
    before = os.umask(0o027)
    try:
        yield
    finally:
        os.umask(before)


def set_readers(run: RunDir, spec: JobSpec) -> None:
    """Open an existing run directory to its group, or close it again, as its spec says.

    A mode that the user gave to a run that is not shared stays. What is written later has the run's umask.
    """
    if spec.share == "group":
        if not run.path.stat().st_mode & stat.S_IXGRP:
            _open(run)
    elif run.job_yaml.exists() and read_spec(run.job_yaml).share == "group":
        run.path.chmod(run.path.stat().st_mode & ~stat.S_IRWXG)


def _open(run: RunDir) -> None:
    for path in (*run.path.rglob("*"), run.path):  # the folder last: an interrupted call is repeated
        if path.is_symlink() or path.name in _SECRET or path.suffix in _SECRET:
            continue
        mode = path.stat().st_mode & ~stat.S_IWGRP  # which a umask of 002 gives
        path.chmod(mode | stat.S_IRGRP | (stat.S_IXGRP if mode & stat.S_IXUSR else 0))
