"""Checks whether the run directory can be written and trusted, and has space for checkpoints."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate import disk
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.run import acting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec

# For logs, metrics and data, beside models and checkpoints.
_LEAST_FREE = 10**9
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MORE_SPACE = "remove old runs (checkpoints first), ask for a larger quota, or set run_dir to another disk"
_POSIX = "set run_dir to a POSIX file system such as NFS, Lustre or GPFS, not an object store or a share without modes"


@contextmanager
def scratch(run: RunDir) -> Iterator[Path]:
    """A temporary folder in the run directory. Removes it, and any folder created for it.

    Raises:
        OSError: it cannot be created.
    """
    created = [path for path in (run.path, *run.path.parents) if not path.exists()]
    folder = run.path / f".doctor-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        for path in reversed(created):
            path.mkdir(mode=0o700 if path == run.path else 0o777)
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in created:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()


def refused(run: RunDir, problem: OSError) -> Finding:
    """The finding for a run directory that cannot be written."""
    message = f"{run.path} cannot be written: {problem.strerror}"
    if problem.errno in _FULL:
        return error("disk", message, _MORE_SPACE)
    return error("run directory", message, "set run_dir to a writable folder on a disk that all nodes share")


def check_trust(run: RunDir, shared: bool) -> Finding:
    """Check that no one else can write to the run directory. ``shared`` is as ``ownership.check`` takes it."""
    try:
        acting.check(run, shared)
    except HpcRlhfError as problem:
        return error("mode", f"{problem.where}: {problem.message}", str(problem.hint))
    return ok("mode", "only you can write to the run directory")


def check_writes(folder: Path, run: RunDir) -> Finding:
    """Check that a file can be written, synced and renamed over another, as checkpoints are."""
    old, new = folder / f"old-{os.getpid()}", folder / f"new-{os.getpid()}"
    data = os.urandom(2**20)
    try:
        old.write_bytes(b"old")
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(old)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        whole = old.read_bytes() == data and not new.exists()
        others = stat.S_IMODE(folder.stat().st_mode) & 0o077
    except OSError as problem:
        return refused(run, problem)
    finally:
        for path in (old, new):
            path.unlink(missing_ok=True)
    if not whole:
        return error("run directory", "a file renamed over another has the wrong content", _POSIX)
    if others:
        return error("run directory", f"a private folder has mode {others:03o} for others", _POSIX)
    return ok("run directory", f"{run.path}: writing, syncing and renaming work")


def bytes_needed(spec: JobSpec, run: RunDir, stages: Collection[str]) -> int | None:
    """Bytes that stages will write in addition to what they have written; None if the size of a model is unknown."""
    needed = 0
    for stage in stages:
        whole = disk.run_bytes(spec, [stage])
        if whole is None:
            return None
        files = run.stage(stage).path.rglob("*")
        needed += max(0, whole - sum(file.lstat().st_size for file in files if file.is_file()))
    return needed


def nearest(path: Path) -> Path:
    """A folder that exists: the path itself, or the innermost above it."""
    return next(each for each in (path, *path.parents) if each.exists())


def check_space(folder: Path, needed: int | None) -> Finding:
    """Check that there is space for a run that needs about this many bytes; None if unknown."""
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    room = f"{_gigabytes(free)} free"
    if needed is None:
        needed, use = 0, "checkpoints need an unknown amount, as the models' sizes are unknown"
    else:
        use = f"checkpoints and models need about {_gigabytes(needed)}"
    if free < max(needed, _LEAST_FREE):
        return error("disk", f"{room}; {use}", _MORE_SPACE)
    if free < 1.5 * needed:
        return warning("disk", f"{room}, which is close; {use}", _MORE_SPACE)
    return ok("disk", f"{room}; {use}")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
