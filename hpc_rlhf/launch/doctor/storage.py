"""Whether the run directory can be written and trusted, and has the space that checkpoints take."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.run import ownership
from hpc_rlhf.run.layout import RunDir

# Beside what a run needs: logs, metrics, data.
_LEAST_FREE = 10**9
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def scratch(run: RunDir) -> Iterator[Path]:
    """A folder of its own in the run directory; afterwards all is as it was.

    Raises:
        OSError: it cannot be made.
    """
    made = [path for path in (run.path, *run.path.parents) if not path.exists()]
    folder = run.path / f".doctor-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        for path in reversed(made):
            path.mkdir(mode=0o700 if path == run.path else 0o777)
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()


def refused(run: RunDir, problem: OSError) -> Finding:
    """What to say of a run directory in which nothing can be written."""
    said = f"{run.path} cannot be written: {problem.strerror}"
    if problem.errno in _FULL:
        return error("disk", said, _MORE_SPACE)
    return error(
        "run directory", said, "set run_dir to a folder that you may write to, on a disk all nodes share"
    )


_MORE_SPACE = (
    "remove old runs (their checkpoints first) or ask for a larger quota, or set run_dir to another disk"
)


def check_trust(run: RunDir) -> Finding:
    """Whether others could put something into the run directory."""
    try:
        ownership.check(run)
    except HpcRlhfError as problem:
        return error("mode", f"{problem.where}: {problem.message}", str(problem.hint))
    above = next(path for path in run.path.parents if path.exists())
    facts = above.stat()
    if facts.st_mode & stat.S_IWOTH and not facts.st_mode & stat.S_ISVTX:
        return warning(
            "mode",
            f"{above}, which everybody may write to, holds the run directory: anyone could put another in its place",
            f"chmod +t {above}, or set run_dir below a folder of your own",
        )
    return ok("mode", "nobody else may write to the run directory")


def check_writes(folder: Path, run: RunDir) -> Finding:
    """Whether a file is written, synced and renamed over another, in a folder of a run directory, as a checkpoint is."""
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
        return error("run directory", "a file renamed over another is not what was written", _POSIX)
    if others:
        return error(
            "run directory", f"a folder made for its owner alone has the mode {others:03o} for others", _POSIX
        )
    return ok("run directory", f"{run.path}: writes, syncs and renames behave")


_POSIX = "set run_dir to a POSIX file system such as NFS, Lustre or GPFS, not an object store or a share without modes"


def check_space(folder: Path, needed: int | None) -> Finding:
    """Whether there is room for a run.

    Args:
        folder: in the run directory.
        needed: bytes, roughly; None where that is not known.
    """
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    room = f"{_gigabytes(free)} free"
    if needed is None:
        needed, wants = 0, "the models' sizes are not known, so neither is what checkpoints take"
    else:
        wants = f"checkpoints and models take about {_gigabytes(needed)}"
    if free < max(needed, _LEAST_FREE):
        return error("disk", f"{room}; {wants}", _MORE_SPACE)
    if free < 1.5 * needed:
        return warning("disk", f"{room}; {wants}, which is close", _MORE_SPACE)
    return ok("disk", f"{room}; {wants}")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
