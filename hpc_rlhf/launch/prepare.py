"""Prepare a run directory for `submit` and `run`: the resolved spec, the plan and the scripts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hpc_rlhf import trust
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.changes import evaluation_changed, refuse_changes, rewards_changed
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.launch.plan import Plan, make_plan
from hpc_rlhf.launch.readers import group_may_read, set_readers
from hpc_rlhf.launch.render import render
from hpc_rlhf.launch.reuse import take_over
from hpc_rlhf.launch.survey import refuse_bad_data
from hpc_rlhf.run import acting, manifest, notify, run_index, secret
from hpc_rlhf.run.files import make_folder, replacing, write_atomically
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec import reward_files, rollout_checks
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.spec.stages import EVALUATION


@contextmanager
def claim(spec: JobSpec, doing: str) -> Iterator[RunDir]:
    """Create the run directory of a spec if necessary, and lock it for this launcher; ``doing`` is as in ``hold``.

    Raises:
        HpcRlhfError: another launcher works on it, this user may not act on it, it holds other files, or it cannot be
            written.
    """
    run = RunDir(Path(spec.run_dir))
    with _write_errors(run):
        existed, shared = run.path.exists(), spec.share == "group"
        acting.check(run, shared)
        if not existed:
            make_folder(run.path, 0o700)
            acting.check(run, shared)  # in a folder such as /tmp, somebody else may have been faster
        set_readers(run, spec)
        foreign = [path.name for path in run.path.iterdir() if not _is_ours(path, run)]
    if foreign and not run.job_yaml.exists():
        raise HpcRlhfError(
            f"run_dir is not a run directory: it holds {sorted(foreign)[0]}",
            where=str(run.path),
            hint="set run_dir to an empty or a new folder",
        )
    with hold(run.submit_lock, doing), group_may_read(spec):
        yield run


def prepare(
    spec: JobSpec, run: RunDir, beside: Path | None = None, live: bool = False,
    lent: Mapping[str, RunDir] | None = None, reused: Mapping[str, RunDir] | None = None,
) -> Plan:  # fmt: skip
    """Write the resolved spec, the plan and the scripts into a claimed run directory, and return the plan.

    What may change in a run that exists is in ``changes``. If its evaluation does, the old result is removed.

    Args:
        beside: folder of the job file; templates in its ``templates/`` take precedence over the built-in
            ones. If None, the run's earlier templates are used.
        live: whether jobs of this run are queued or running.
        lent: runs of the same sweep that train stages for this one, by stage; prepared before.
        reused: runs from which to take finished stages, by stage, as ``reuse`` finds them.

    Raises:
        HpcRlhfError: the spec changes what cannot change, the directory cannot be written, there is no address to
            notify, a new run's data cannot be read or lacks what a stage needs, a stage to take over is not intact, or
            a stage that is not done needs a vLLM that is not here.
    """
    refuse_changes(run, spec, live)
    for stage, wrong in rollout_checks.absent(spec):
        if not manifest.is_done(run.stage(stage)):
            raise HpcRlhfError(wrong, where=f"stages.{stage}.rollout", hint=rollout_checks.INSTALL)
    if spec.notify.webhook is not None:
        notify.address(spec.notify.webhook)  # fail now rather than when the run ends
    if not run.job_yaml.exists():
        refuse_bad_data(spec)
    plan = make_plan(spec)
    with _write_errors(run):
        if evaluation_changed(run, spec):
            shutil.rmtree(run.stage(EVALUATION.name).path, ignore_errors=True)
        for stage in rewards_changed(run, spec):
            shutil.rmtree(run.stage(stage).rewards, ignore_errors=True)  # nothing was learned from these scores
        for stage, lender in (lent or {}).items():
            _link(run.stage(stage).path, lender.stage(stage).path)
        for folder in (run.scripts, *(run.stage(stage).logs for stage in spec.stage_names)):
            make_folder(folder, 0o700)
        beside = run.scripts if beside in (None, run.path) else beside
        render(plan, run.scripts, beside)
        keep_templates(run.scripts, beside)
        write_atomically(run.plan_json, plan.to_json())
        write_atomically(run.job_yaml, dump_spec(reward_files.with_files(spec, partial(_keep_reward, run))))
        secret.read(run)
        for stage, source in (reused or {}).items():
            take_over(run, stage, source)
    run_index.remember(run.path)
    return plan


def _is_ours(path: Path, run: RunDir) -> bool:
    """Whether a launcher that was killed may have left this file, before there was a job.yaml."""
    partial = (run.submit_lock.name, *(f".{file.name}." for file in (run.plan_json, run.job_yaml)))
    return path.name.startswith(partial) or path in (run.ledger, run.plan_json, run.scripts, run.path / "stages")


@contextmanager
def _write_errors(run: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        raise HpcRlhfError(
            f"cannot write the run directory: {'it is not a folder' if in_the_way else error.strerror}",
            where=str(error.filename or run.path),
            hint="set run_dir to a folder you may write to",
        ) from error


def _link(path: Path, target: Path) -> None:
    """Link a stage's folder to another run's, unless the run has its own or such a link already."""
    if not path.is_symlink() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(target, path.parent))


def _keep_reward(run: RunDir, file: Path) -> str:
    """Copy a Python file with a reward into the run directory, so that later attempts use the same.

    Raises:
        HpcRlhfError: somebody else could change it.
    """
    copy = run.reward_file(reward_files.digest(file), file.name)
    if not copy.exists():
        trust.check([file], "use a copy in a folder of your own")
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(copy) as new:
            new.write_bytes(file.read_bytes())
    return str(copy)


def keep_templates(folder: Path, beside: Path) -> None:
    """Copy the user's templates into a folder of the run, for later jobs such as one that serves a model."""
    copies = folder / "templates"
    if beside == folder:
        return
    shutil.rmtree(copies, ignore_errors=True)
    for name, template in inputs.templates(beside).items():
        copy = copies / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(template.content)
