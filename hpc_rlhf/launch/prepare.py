"""Prepare a run directory for `submit` and `run`: the resolved spec, the plan and the scripts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.lock import hold
from hpc_rlhf.launch.plan import Plan, make_plan
from hpc_rlhf.launch.render import render
from hpc_rlhf.launch.survey import refuse_bad_data
from hpc_rlhf.run import acting, notify, run_index
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.batch import derive_batch
from hpc_rlhf.spec.cluster import SIZE
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec, read_spec
from hpc_rlhf.spec.stages import EVALUATION, STAGE_NAMES

# A stage's settings that decide how its steps are split over ranks, besides those of Slurm (SIZE).
_BATCH_FIELDS = {"micro_batch", "global_batch"}
_MAX_LISTED = 12


@contextmanager
def claim(spec: JobSpec, doing: str) -> Iterator[RunDir]:
    """Create the run directory of a spec if necessary, and lock it for this launcher; ``doing`` is as in ``hold``.

    Raises:
        HpcRlhfError: another launcher works on it, this user may not act on it, it holds other files, or it cannot be
            written.
    """
    run = RunDir(Path(spec.run_dir))
    with _write_errors(run):
        acting.check(run)
        _private_folder(run.path)
        foreign = [path.name for path in run.path.iterdir() if not _is_ours(path, run)]
    if foreign and not run.job_yaml.exists():
        raise HpcRlhfError(
            f"run_dir is not a run directory: it holds {sorted(foreign)[0]}",
            where=str(run.path),
            hint="set run_dir to an empty or a new folder",
        )
    with hold(run.submit_lock, doing):
        yield run


def prepare(
    spec: JobSpec, run: RunDir, beside: Path | None = None, live: bool = False,
    lent: Mapping[str, RunDir] | None = None,
) -> Plan:  # fmt: skip
    """Write the resolved spec, the plan and the scripts into a claimed run directory, and return the plan.

    Once a run has trained, only two things may change. Its Slurm settings may split the same steps over another
    number of ranks. Its evaluation may differ, and then the old result is removed. While jobs are queued or
    running, nothing may change.

    Args:
        beside: folder of the job file; templates in its ``templates/`` take precedence over the built-in
            ones. If None, the run's earlier templates are used.
        live: whether jobs of this run are queued or running.
        lent: runs of the same sweep that train stages for this one, by stage; prepared before.

    Raises:
        HpcRlhfError: the directory belongs to a different spec or cannot be written, there is no address to notify, or
            a new run's data cannot be read or lacks what a stage needs.
    """
    refuse_changes(run, spec, live)
    if spec.notify.webhook is not None:
        notify.address(spec.notify.webhook)  # fail now rather than when the run ends
    if not run.job_yaml.exists():
        refuse_bad_data(spec)
    plan = make_plan(spec)
    with _write_errors(run):
        if evaluation_changed(run, spec):
            shutil.rmtree(run.stage(EVALUATION.name).path, ignore_errors=True)
        for stage, lender in (lent or {}).items():
            _link(run.stage(stage).path, lender.stage(stage).path)
        for folder in (run.scripts, *(run.stage(stage).logs for stage in spec.stage_names)):
            _private_folder(folder)
        beside = run.scripts if beside in (None, run.path) else beside
        render(plan, run.scripts, beside)
        _keep_templates(run, beside)
        write_atomically(run.plan_json, plan.to_json())
        write_atomically(run.job_yaml, dump_spec(spec))
    run_index.remember(run.path)
    return plan


def differences(old: JobSpec, new: JobSpec) -> list[tuple[str, object, object]]:
    """Fields that differ, each as (dotted path, old value, new value).

    A stage's Slurm settings include the top-level ones, so those are compared only where a stage uses them.
    """
    exclude = {"slurm", "run_dir"}
    return list(_walk("", old.model_dump(mode="json", exclude=exclude), new.model_dump(mode="json", exclude=exclude)))


def _walk(path: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _walk(f"{path}.{key}" if path else key, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _walk(f"{path}.{index}", *pair)
    elif old != new:
        yield path, old, new


def refuse_changes(run: RunDir, spec: JobSpec, live: bool) -> None:
    """Raise HpcRlhfError if a run directory belongs to a different spec. Changes nothing."""
    if not run.job_yaml.exists():
        return
    old = read_spec(run.job_yaml)
    changes = differences(old, spec)
    if live:
        hint = f"stop its jobs first (hpc-rlhf cancel {run.path}), or choose another run_dir"
    elif has_trained(run):
        changes = [c for c in changes if not is_harmless(c[0]) and not _same_steps_on_other_ranks(c[0], old, spec)]
        hint = "undo the changes, or choose another run_dir" + _resume_hint(changes, old)
    else:
        return
    if not changes:
        return
    lines = [f"  {path}: {_shown(old)} -> {_shown(new)}" for path, old, new in changes[:_MAX_LISTED]]
    if len(changes) > _MAX_LISTED:
        lines.append(f"  and {len(changes) - _MAX_LISTED} more")
    raise HpcRlhfError(
        "this run directory belongs to a different spec:\n" + "\n".join(lines), where=str(run.path), hint=hint
    )


def evaluation_changed(run: RunDir, spec: JobSpec) -> bool:
    """Whether a spec's evaluation differs from that of its run directory."""
    if spec.evaluation is None or not run.job_yaml.exists():
        return False
    return any(_decides(path) == "evaluation" for path, _, _ in differences(read_spec(run.job_yaml), spec))


def has_trained(run: RunDir) -> bool:
    """Whether any stage has written files that depend on the spec, which logs and the hostfile do not."""
    for stage in map(run.stage, STAGE_NAMES):
        own = stage.path.exists() and not stage.path.is_symlink()
        if own and set(stage.path.iterdir()) - {stage.logs, stage.hostfile}:
            return True
    return False


def is_harmless(path: str) -> bool:
    """Whether a field may change after a run has trained."""
    return _decides(path) in ("placement", "evaluation", "reporting")


def _decides(path: str) -> str:
    """What a field decides: a stage's "placement", which may change between two attempts, its "split" over ranks,
    the "evaluation", "reporting" or, by default, "training"."""
    top, *rest = path.split(".")
    if top != "stages":
        return "reporting" if top in ("trackers", "notify") else "training"
    stage, *field = rest
    if field[:1] == ["slurm"] and field[1] not in SIZE:
        return "placement"
    if stage == EVALUATION.name:
        return "evaluation"
    return "split" if field[:1] == ["slurm"] or (len(field) == 1 and field[0] in _BATCH_FIELDS) else "training"


def _same_steps_on_other_ranks(path: str, old: JobSpec, new: JobSpec) -> bool:
    """Whether a field only changes how a stage's steps are split over ranks."""
    if _decides(path) != "split":
        return False
    stage = path.split(".")[1]
    return _global_batch(old, stage) == _global_batch(new, stage)


def _resume_hint(changes: list[tuple[str, object, object]], old: JobSpec) -> str:
    """How a stage may resume on another number of ranks."""
    stages = sorted({path.split(".")[1] for path, _, _ in changes if _decides(path) == "split"})
    fields = [f"stages.{stage}.global_batch: {_global_batch(old, stage)}" for stage in stages]
    return f"; to split the same steps over other ranks, set {' and '.join(fields)}" if fields else ""


def _global_batch(spec: JobSpec, stage: str) -> int:
    return derive_batch(spec.stage(stage), stage).global_


def _shown(value: object) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _is_ours(path: Path, run: RunDir) -> bool:
    """Whether a failed claim may have left this file, before there was a job.yaml."""
    return path.name.startswith(run.submit_lock.name) or path in (run.ledger, run.scripts, run.path / "stages")


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


def _keep_templates(run: RunDir, beside: Path) -> None:
    """Copy the user's templates into the run directory, for later jobs such as one that serves a model."""
    copies = run.scripts / "templates"
    if beside == run.scripts:
        return
    shutil.rmtree(copies, ignore_errors=True)
    for template in (beside / "templates").rglob("*.j2"):
        copy = copies / template.relative_to(beside / "templates")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template, copy)


def _private_folder(folder: Path) -> None:
    """Create a folder that only its owner may enter; its parents get the usual mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
