"""The RUN of the verbs that look at a run: its directory, or the job file that names it."""

from __future__ import annotations

from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.rundir import RunDir


def find_run(argument: str) -> RunDir:
    """The run directory that a verb's argument means.

    Raises:
        HpcRlhfError: there is none.
    """
    path = Path(argument)
    if path.is_file():
        from hpc_rlhf.spec.load import load_spec

        path = Path(load_spec(path).run_dir)
    run = RunDir(path.absolute())
    if not run.job_yaml.is_file():
        what = "is not a run directory: it has no job.yaml" if path.is_dir() else "does not exist"
        raise HpcRlhfError(
            what,
            where=str(path),
            hint="give the run_dir of a run that was submitted or run, or its job file",
        )
    return run
