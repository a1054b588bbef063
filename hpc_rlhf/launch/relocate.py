"""Adopt a run directory where it is now: make its spec, plan and scripts name this folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.jobs import living_jobs
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import render
from hpc_rlhf.run import acting, run_index
from hpc_rlhf.run.events import Relocated, Serving, Submitting
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec, read_spec


def relocate(run: RunDir) -> Path | None:
    """Adopt a run that was moved or copied here, and return the folder where it was made; None if that is this one.

    A copy becomes a run of its own: it keeps what the original had trained, and has none of its jobs. What is written
    last is what ``acting`` reads, so that an interrupted call can be repeated.

    Raises:
        HpcRlhfError: it is another user's, jobs of the moved run are queued or running, or a process works on it.
    """
    acting.check_owner(run)
    origin = acting.made_elsewhere(run)
    if origin is None:
        return None
    with hold(run.submit_lock, "hpc-rlhf relocate"):
        copied = acting.is_copy(run, origin)
        spec = _moved(read_spec(run.job_yaml), origin, run.path)
        if not copied:
            _refuse_live_jobs(run, origin)
        for stage in spec.stage_names:
            Ledger(run.ledger).append(Relocated(stage, source=str(origin)))
            _relink(run.stage(stage).path, RunDir(origin).stage(stage).path)
            # Or two runs would send metrics to one. A link leads to a stage of another run of the sweep.
            if copied and not run.stage(stage).path.is_symlink():
                run.stage(stage).trackers.unlink(missing_ok=True)
                run.stage(stage).serve_token.unlink(missing_ok=True)
        if copied:
            run.secret.unlink(missing_ok=True)  # the original's owner knows it
        plan = make_plan(spec)
        render(plan, run.scripts, run.scripts)
        write_atomically(run.job_yaml, dump_spec(spec))
        write_atomically(run.plan_json, plan.to_json())
    run_index.remember(run.path)
    return origin


def _moved(spec: JobSpec, old: Path, new: Path) -> JobSpec:
    """The spec with all paths in the old folder in the new one."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return tuple(map(moved, value))
        if isinstance(value, str) and (value == str(old) or value.startswith(f"{old}/")):
            return str(new) + value[len(str(old)) :]
        return value

    return JobSpec.model_validate(moved(spec.model_dump()))


def _refuse_live_jobs(run: RunDir, origin: Path) -> None:
    """Raise HpcRlhfError if jobs of a moved run are queued or running: they work in the old folder."""
    submitted = any(isinstance(event, Submitting | Serving) for event in Ledger(run.ledger).events())
    if not submitted or not commands.available():
        return
    if ids := [job.job_id for _, job in living_jobs(run)]:
        raise HpcRlhfError(
            f"jobs of this run are queued or running, and work in {origin}, where it was: {', '.join(ids)}",
            where=str(run.path),
            hint=f"move it back, or cancel them and relocate it then: scancel {shlex.join(ids)}",
        )


def _relink(link: Path, old: Path) -> None:
    """Let the link to a stage of another run lead where it led in the run's old folder."""
    if link.is_symlink() and not link.exists():
        target = Path(os.path.normpath(old.parent / os.readlink(link)))
        if target.exists():
            link.unlink()
            link.symlink_to(os.path.relpath(target, link.parent))
