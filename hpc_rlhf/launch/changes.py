"""What may change in the spec of a run that exists.

Once a run has trained, what its results depend on stays. Four kinds of settings may change: where its jobs run and
over how many ranks they split the same steps, the evaluation, who is informed, and what happens when a reward fails. A
stage's rewards may change until something depends on them. While its jobs are queued or running, nothing may.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import RunDir, StageDir
from hpc_rlhf.spec import reward_files
from hpc_rlhf.spec.batch import derive_batch
from hpc_rlhf.spec.cluster import SIZE
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import EVALUATION, STAGE_NAMES

# A stage's settings that decide how its steps are split over ranks, besides those of Slurm (SIZE).
_SPLIT_FIELDS = {"micro_batch", "global_batch", "sequence_parallel", "pipeline_parallel", "tensor_parallel"}
# A reward's settings that scores do not depend on.
_FAILURE_FIELDS = {"on_error", "timeout"}
_MAX_LISTED = 12

Change = tuple[str, object, object]  # dotted path, old value, new value


def differences(old: JobSpec, new: JobSpec) -> list[Change]:
    """The fields that differ.

    A stage's Slurm settings include the top-level ones, so those are compared only where a stage uses them. Files with
    rewards are compared by their content.
    """
    old, new = reward_files.by_content(old), reward_files.by_content(new)
    exclude = {"slurm", "run_dir"}
    return list(walk(old.model_dump(mode="json", exclude=exclude), new.model_dump(mode="json", exclude=exclude)))


def walk(old: object, new: object, path: str = "") -> Iterator[Change]:
    """The leaves in which two trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from walk(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from walk(*pair, f"{path}.{index}")
    elif old != new:
        yield path, old, new


def refuse_changes(run: RunDir, spec: JobSpec, live: bool) -> None:
    """Raise HpcRlhfError if a spec changes what cannot change in its run directory, or not now. Changes nothing.

    Args:
        live: whether jobs of the run are queued or running.
    """
    if not run.job_yaml.exists():
        return
    old = read_spec(run.job_yaml)
    changes = differences(old, spec)
    kept = [change for change in changes if not may_change(change[0], old, spec)] if has_trained(run) else []
    kept = [change for change in kept if (stage := rewarded(change[0])) is None or has_learned(run.stage(stage))]
    here = shlex.quote(str(run.path))
    if kept:
        later = [change for change in changes if change not in kept]
        others = f"\nthese could{', once its jobs are cancelled' if live else ''}:\n{_listed(later)}" if later else ""
        raise HpcRlhfError(
            f"this run has trained, so what its results depend on cannot change any more:\n{_listed(kept)}{others}",
            where=str(run.path),
            hint="leave it as it is; for the new values make another run, which takes over the finished stages that "
            f"they do not affect: submit or run FILE --set run_dir=NEW --reuse {here}{_resume_hint(kept, old)}",
        )
    if live and changes:
        raise HpcRlhfError(
            f"this can change, but not while the run's jobs are queued or running:\n{_listed(changes)}",
            where=str(run.path),
            hint=f"cancel its jobs, and submit again; they resume from their checkpoints: hpc-rlhf cancel {here}",
        )


def _listed(changes: list[Change]) -> str:
    lines = [describe(change) for change in changes[:_MAX_LISTED]]
    if len(changes) > _MAX_LISTED:
        lines.append(f"and {len(changes) - _MAX_LISTED} more")
    return "\n".join(f"  {line}" for line in lines)


def describe(change: Change) -> str:
    """A change in words."""
    path, *values = change
    old, new = ("unset" if value is None else str(value) for value in values)
    return f"{path}: {_short(old)} -> {_short(new)}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def may_change(path: str, old: JobSpec, new: JobSpec) -> bool:
    """Whether a field may change after a run has trained."""
    return is_harmless(path) or is_same_split(path, old, new)


def rewarded(path: str) -> str | None:
    """The stage whose rewards a field is part of; None for other fields."""
    top, stage, field, *_ = (*path.split("."), "", "")
    return stage if (top, field) == ("stages", "rewards") else None


def rewards_changed(run: RunDir, spec: JobSpec) -> set[str]:
    """The stages whose rewards differ from those of its run directory."""
    if not run.job_yaml.exists():
        return set()
    stages = {rewarded(path) for path, _, _ in differences(read_spec(run.job_yaml), spec) if not is_harmless(path)}
    return {stage for stage in stages if stage is not None}


def evaluation_changed(run: RunDir, spec: JobSpec) -> bool:
    """Whether a spec's evaluation differs from that of its run directory."""
    if spec.evaluation is None or not run.job_yaml.exists():
        return False
    return any(_decides(path) == "evaluation" for path, _, _ in differences(read_spec(run.job_yaml), spec))


def has_trained(run: RunDir) -> bool:
    """Whether any stage has written files that depend on the spec, which logs and the hostfile do not."""
    return any(has_begun(stage) and not stage.path.is_symlink() for stage in map(run.stage, STAGE_NAMES))


def has_begun(stage: StageDir) -> bool:
    """The same for one stage, which may be a link to another run's."""
    return stage.path.exists() and bool(set(stage.path.iterdir()) - {stage.logs, stage.hostfile, stage.reused_model})


def has_learned(stage: StageDir) -> bool:
    """Whether a stage has results of its rewards, apart from scores from which nothing was learned yet."""
    learned = stage.metrics.exists() or stage.samples.exists() or any(stage.checkpoints.glob("step-*"))
    return learned or stage.path.is_symlink()  # reused: another run's stage, trained with that run's rewards


def is_harmless(path: str) -> bool:
    """Whether no result of training depends on a field."""
    return _decides(path) in ("placement", "evaluation", "reporting", "failures")


def _decides(path: str) -> str:
    """What a field decides: a stage's "placement", which may change between two attempts, its "split" over ranks,
    the "evaluation", "reporting", what follows from "failures" of rewards or, by default, "training"."""
    top, *rest = path.split(".")
    if top == "follows":
        return "evaluation"
    if top != "stages":
        return "reporting" if top in ("trackers", "notify", "share") else "training"
    stage, *field = rest
    if field[:1] == ["slurm"] and field[1] not in SIZE:
        return "placement"
    if stage == EVALUATION.name:
        return "evaluation"
    if rewarded(path) is not None and field[-1] in _FAILURE_FIELDS:
        return "failures"
    return "split" if field[:1] == ["slurm"] or (len(field) == 1 and field[0] in _SPLIT_FIELDS) else "training"


def is_same_split(path: str, old: JobSpec, new: JobSpec) -> bool:
    """Whether a difference in a field only changes how a stage's steps are split over ranks."""
    if _decides(path) != "split":
        return False
    stage = path.split(".")[1]
    return _global_batch(old, stage) == _global_batch(new, stage)


def _resume_hint(changes: list[Change], old: JobSpec) -> str:
    """How a stage may resume on another number of ranks."""
    stages = sorted({path.split(".")[1] for path, _, _ in changes if _decides(path) == "split"})
    fields = [f"stages.{stage}.global_batch: {_global_batch(old, stage)}" for stage in stages]
    return f"; to split the same steps over other ranks, set {' and '.join(fields)}" if fields else ""


def _global_batch(spec: JobSpec, stage: str) -> int:
    return derive_batch(spec.stage(stage), stage).global_
