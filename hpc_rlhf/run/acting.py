"""Whether this user may act on a run directory: it must be theirs, and where it was made.

A run's scripts, jobs and spec name its folder by an absolute path. So what acts on a moved or copied run would act on
the folder where the run was made, and on that folder's jobs.
"""

from __future__ import annotations

import json
import os
import pwd
import shlex
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import ownership
from hpc_rlhf.run.layout import RunDir


def check(run: RunDir, shared: bool | None = None) -> None:
    """Every verb that writes to a run, changes its jobs or executes what is in it calls this first.

    Args:
        run: its folder may be missing.
        shared: as ``ownership.check`` takes it.

    Raises:
        HpcRlhfError: it belongs to another user, others could have written to it, or it was made elsewhere.
    """
    check_owner(run, shared)
    check_place(run)


def check_place(run: RunDir) -> None:
    """Raise HpcRlhfError if a run was made elsewhere."""
    if (origin := made_elsewhere(run)) is None:
        return
    here = shlex.quote(str(run.path))
    if is_copy(run, origin):
        raise HpcRlhfError(
            f"this run is a copy: it was made in {origin}, which still has it, with its jobs",
            where=str(run.path),
            hint=f"use {origin}; to make the copy a run of its own: hpc-rlhf relocate {here}",
        )
    raise HpcRlhfError(
        f"this run was moved: it was made in {origin}", where=str(run.path), hint=f"adopt it: hpc-rlhf relocate {here}"
    )


def check_owner(run: RunDir, shared: bool | None = None) -> None:
    """The part of ``check`` that does not depend on where the run was made. Raises HpcRlhfError."""
    if (who := other_owner(run)) is not None:
        raise HpcRlhfError(
            f"this run belongs to {who}, and only {who} can change it or its jobs",
            where=str(run.path),
            hint="read it with status, logs, report --out and chat; to start from its models, name their folders under "
            "models in a spec of your own",
        )
    ownership.check(run, shared=shared)


def other_owner(run: RunDir) -> str | None:
    """The name, or without one the number, of the other user to whom a run belongs; None if it is this user's."""
    try:
        owner = run.path.stat().st_uid
        return None if owner == os.geteuid() else pwd.getpwuid(owner).pw_name
    except FileNotFoundError:
        return None
    except KeyError:
        return str(owner)


def made_elsewhere(run: RunDir) -> Path | None:
    """The folder in which a run was made; None if that is this one, or unknown."""
    try:
        origin = Path(json.loads(run.plan_json.read_text(encoding="utf-8"))["run_dir"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return None if is_same_folder(origin, run.path) else origin


def is_same_folder(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same folder; file systems have other names on other machines."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def is_copy(run: RunDir, origin: Path) -> bool:
    """Whether the same run is still where it was made; another one may have taken its place."""

    def beginning(path: Path) -> bytes:
        with path.open("rb") as file:
            return file.readline()

    try:
        return beginning(run.ledger) == beginning(RunDir(origin).ledger)
    except PermissionError:
        return True  # its owner has closed it since
    except OSError:
        return RunDir(origin).plan_json.exists()


def run_of(job_file: Path) -> RunDir | None:
    """The run whose resolved spec a file is; None for a user's own job file."""
    run = RunDir(job_file.absolute().parent)
    ours = job_file.name == run.job_yaml.name and run.plan_json.is_file() and (run.path / "stages").is_dir()
    return run if ours else None
