"""The RUN of the verbs that look at a run: its directory, or the job file that names it."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import RunDir, SweepDir

_SHOWN = 3


def find_run(argument: str) -> RunDir:
    """The run directory that a verb's argument means.

    Raises:
        HpcRlhfError: there is none, or it means the runs of a sweep.
    """
    runs = find_runs(argument)
    if len(runs) > 1:
        names = [str(run.path) for run in runs[:_SHOWN]]
        more = "" if len(runs) <= _SHOWN else ", \u2026"
        raise HpcRlhfError(
            f"is a sweep of {len(runs)} runs, and this verb takes one",
            where=argument,
            hint=f"give one of {', '.join(names)}{more}",
        )
    return runs[0]


def find_runs(argument: str) -> list[RunDir]:
    """The run directories that a verb's argument means: one, or those of a sweep.

    Raises:
        HpcRlhfError: there is none.
    """
    path = Path(argument)
    named: list[RunDir] = []
    if path.is_file():
        from hpc_rlhf.spec.sweep import Sweep, load_any

        spec = load_any(path)
        path = spec.run_dir if isinstance(spec, Sweep) else Path(spec.run_dir)
        if isinstance(spec, Sweep):
            named = [SweepDir(path.absolute()).run(member.name) for member in spec.members]
    elif not RunDir(path).job_yaml.is_file():
        named = _noted(SweepDir(path.absolute()))
    runs = [run for run in named or [RunDir(path.absolute())] if run.job_yaml.is_file()]
    if not runs:
        what = "is not a run directory: it has no job.yaml" if path.is_dir() else "does not exist"
        raise HpcRlhfError(
            what,
            where=str(path),
            hint="give the run_dir of a run that was submitted or run, or its job file",
        )
    return runs


def _noted(sweep: SweepDir) -> list[RunDir]:
    """The runs that a sweep's folder says it has."""
    try:
        return [sweep.run(name) for name in json.loads(sweep.json.read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []
