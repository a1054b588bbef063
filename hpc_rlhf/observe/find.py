"""Find the runs that a user names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.gather import RunPlan
from hpc_rlhf.run import acting, run_index
from hpc_rlhf.run.layout import RunDir, SweepDir


def find_run(argument: str) -> RunDir:
    """The one run directory that RUN refers to, in any of the ways that ``find_runs`` lists.

    Raises:
        HpcRlhfError: there is none, or RUN is a sweep of several runs.
    """
    runs = find_runs(argument)
    if len(runs) > 1:
        raise HpcRlhfError(f"is a sweep of {len(runs)} runs, but one run is needed", where=argument, hint=_choose(runs))
    return runs[0]


def find_runs(argument: str) -> list[RunDir]:
    """The run directories that RUN refers to: at least one, and all of them if it is a sweep.

    RUN is a run directory, a job file, a sweep's folder, or else the name of a run that `hpc-rlhf list` shows.

    Raises:
        HpcRlhfError: there is none, it may not be read, or several runs have that name.
    """
    path = Path(argument)
    try:
        at_path = _runs_at(path)
        runs = [run for run in at_path if run.job_yaml.is_file()]
        named = [] if runs or path.exists() else _runs_named(argument)  # a path must not become another run's name
    except PermissionError as error:
        raise HpcRlhfError(
            "you have no permission to read it",
            where=str(error.filename),
            hint="ask its owner to share it with your group: share in the spec",
        ) from error
    if len(named) > 1:
        raise HpcRlhfError(f"is the name of {len(named)} runs", where=argument, hint=_choose(named))
    if not runs and not named:
        missing = at_path[0].path if path.is_file() else path
        raise HpcRlhfError(
            "is not a run directory: it has no job.yaml" if missing.is_dir() else "does not exist",
            where=str(missing),
            hint="give the run_dir of a run that was started with submit or run, its job file, or its name in "
            "hpc-rlhf list",
        )
    return runs or named


def find_search(argument: str) -> SweepDir | None:
    """The folder of the search that RUN refers to, its folder or job file; None if it is something else."""
    path = Path(argument)
    if path.is_file() and acting.run_of(path) is None:
        from hpc_rlhf.spec.sweep import load_any

        path = Path(load_any(path).run_dir)
    folder = SweepDir(path.absolute())
    return folder if os.path.isfile(folder.trials) else None  # unlike Path.is_file, false where it may not be read


def _runs_at(path: Path) -> list[RunDir]:
    """The runs of a folder or a job file; some may not exist yet."""
    if (own := acting.run_of(path)) is not None:
        return [own]
    if path.is_file() or str(path) == "-":
        from hpc_rlhf.spec.sweep import Sweep, load_any

        spec = load_any(path)
        if isinstance(spec, Sweep) and spec.search is None:
            return [SweepDir(spec.run_dir.absolute()).run(member.name) for member in spec.members]
        path = Path(spec.run_dir)
    run = RunDir(path.absolute())
    sweep = SweepDir(run.path)
    members = [] if run.job_yaml.is_file() else [sweep.run(name) for name in sweep.recorded()[0]]
    return members or [run]


def _runs_named(name: str) -> list[RunDir]:
    """The runs in the user's index with a name, which may be shortened with … as `list` does."""
    runs = []
    for run in map(RunDir, run_index.known()):
        with suppress(HpcRlhfError):
            known = RunPlan.read(run).name
            if known == name or (name.endswith("…") and known.startswith(name[:-1])):
                runs.append(run)
    return runs


def _choose(runs: Sequence[RunDir]) -> str:
    names = [str(run.path) for run in runs]
    return f"choose one: {', '.join(names if len(names) <= 3 else [*names[:3], '…'])}"
