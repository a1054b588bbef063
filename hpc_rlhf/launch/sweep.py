"""Launch the runs of a sweep. The first that has a shared stage trains it; it is linked into the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.chain import Outcome
from hpc_rlhf.launch.jobs import cancel
from hpc_rlhf.launch.submit import submit
from hpc_rlhf.run import acting
from hpc_rlhf.run.files import make_folder, write_atomically
from hpc_rlhf.run.layout import RunDir, SweepDir
from hpc_rlhf.spec.sweep import Sweep, lenders


def submit_sweep(
    sweep: Sweep, beside: Path | None = None, reused: Mapping[str, Mapping[str, RunDir]] | None = None
) -> dict[str, list[Outcome]]:
    """Submit the missing stages of every run as one graph. Returns the outcomes by run.

    Args:
        beside, reused: as ``prepare`` takes them, ``reused`` by run.

    Raises:
        HpcRlhfError: there is no Slurm here, or a run cannot be submitted; the jobs that this call submitted
            are cancelled.
    """
    lent = lay_out(sweep)
    outcomes: dict[str, list[Outcome]] = {}
    try:
        for member in sweep.members:
            outcomes[member.name] = submit(member.spec, beside, lent[member.name], (reused or {}).get(member.name))
    except HpcRlhfError as error:
        submitted = [name for name, done in outcomes.items() if any(each.did == "submitted" for each in done)]
        for name in reversed(submitted):
            cancel(SweepDir(sweep.run_dir).run(name))
        cancelled = f"; cancelled {', '.join(submitted)} again" if submitted else ""
        raise HpcRlhfError(f"{error.message}{cancelled}", error.where, error.hint, error.exit_code) from error
    return outcomes


def lay_out(sweep: Sweep) -> dict[str, Mapping[str, RunDir]]:
    """Write the sweep's folder. Returns, for each run by name, the runs that train stages for it.

    Raises:
        HpcRlhfError: the folder cannot be written, or is not this user's.
    """
    folder = SweepDir(sweep.run_dir)
    make_sweep_folder(folder)
    facts: dict[str, object] = {"runs": [member.name for member in sweep.members], "limit": sweep.limit}
    if sweep.search is not None:
        facts["halving"] = sweep.search.spec.halving
    with _write_errors(folder):
        write_atomically(folder.json, json.dumps(facts, indent=1) + "\n")
    return shared(sweep)


def make_sweep_folder(folder: SweepDir) -> None:
    """Create a sweep's folder unless it exists.

    Raises:
        HpcRlhfError: it cannot be created, or is not this user's.
    """
    acting.check_owner(RunDir(folder.path))
    with _write_errors(folder):
        make_folder(folder.path)


@contextmanager
def _write_errors(folder: SweepDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HpcRlhfError(
            f"cannot write the sweep's folder: {error.strerror}",
            where=str(error.filename or folder.path),
            hint="set run_dir to a folder you may write to",
        ) from error


def shared(sweep: Sweep) -> dict[str, Mapping[str, RunDir]]:
    """For each run by name, the runs that train stages for it. Existing runs come first."""
    folder = SweepDir(sweep.run_dir)
    old_first = sorted(sweep.members, key=lambda member: not folder.run(member.name).job_yaml.exists())
    lent: dict[str, dict[str, RunDir]] = {member.name: {} for member in sweep.members}
    for (name, stage), lender in lenders({member.name: member.spec for member in old_first}).items():
        lent[name][stage] = folder.run(lender)
    return dict(lent)
