"""Take finished stages over from another run: those whose results this run's spec would compute again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.changes import describe, has_begun, is_same_split, walk
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Reused
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stage_inputs import inputs, with_needs

_MAX_LISTED = 3


@dataclass(frozen=True)
class Reuse:
    """What becomes of a stage that the run has not begun.

    Attributes:
        source: the run from which it is taken; None if it is not.
        why: why it is not; empty if it is.
    """

    stage: str
    source: RunDir | None
    why: str = ""


def find(
    specs: Mapping[str, JobSpec], others: Sequence[RunDir], lent: Mapping[str, Mapping[str, RunDir]]
) -> dict[str, list[Reuse]]:
    """Look in other runs for the finished stages of specs whose inputs are unchanged. Changes nothing.

    Args:
        specs: of the runs of a sweep, by name, or of one run.
        others: the first one that has a stage is taken.
        lent: for each run, stages that another run of the sweep trains for it.

    Returns:
        For each run, what becomes of every stage of its own that it has not begun.

    Raises:
        HpcRlhfError: no run has begun, and there is nothing that any of them could take.
    """
    found: dict[str, list[Reuse]] = {}
    begun = False
    for name, spec in specs.items():
        found[name] = []
        for stage in (each for each in spec.stage_names if each not in lent.get(name, ())):
            if has_begun(RunDir(Path(spec.run_dir)).stage(stage)):
                begun = True
                continue
            reasons = {other: _why_not(spec, stage, other) for other in others}
            source = next((other for other, why in reasons.items() if not why), None)
            found[name].append(Reuse(stage, source, "" if source else min(reasons.values(), key=len)))
    if not begun and not any(each.source for reuses in found.values() for each in reuses):
        reasons_given = "".join(f"\n  {each.stage}: {each.why}" for each in next(iter(found.values())))
        raise HpcRlhfError(
            f"no stage can be reused:{reasons_given}",
            where=", ".join(str(other.path) for other in others),
            hint="undo these changes, or leave out --reuse to train all stages",
        )
    return found


def _why_not(spec: JobSpec, stage: str, other: RunDir) -> str:
    """Why a stage of another run cannot be taken; empty if it can."""
    before = read_spec(other.job_yaml)
    if stage not in before.stage_names:
        return "that run has no such stage"
    if not manifest.is_done(other.stage(stage)):
        return "it is not finished there"
    differences = walk(inputs(before, stage), inputs(spec, stage))
    changes = [change for change in differences if not is_same_split(change[0], before, spec)]
    if changes:
        more = f" and {len(changes) - _MAX_LISTED} more" if len(changes) > _MAX_LISTED else ""
        return f"{', '.join(map(describe, changes[:_MAX_LISTED]))}{more}"
    return next(_modified(spec, stage, other), "")


def take_over(run: RunDir, stage: str, source: RunDir) -> None:
    """Put a finished stage of another run into this one: links to its files where possible, or else copies.

    Either run can then be removed without the other.

    Raises:
        HpcRlhfError: its files do not match its manifest.
    """
    files, theirs = run.stage(stage), source.stage(stage)
    if files.model.exists():
        return
    partial = files.reused_model
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _copy(theirs.model, partial)
        if (defect := manifest.defect(partial)) is not None:
            raise HpcRlhfError(
                f"the model of stage {stage} cannot be reused: {defect}",
                where=str(theirs.model),
                hint="it was changed since it was trained; leave out --reuse to train it again",
            )
        Ledger(run.ledger).append(Reused(stage, source=str(source.path)))
        partial.rename(files.model)
        for mine, other in ((files.metrics, theirs.metrics), (files.samples, theirs.samples)):
            if other.is_file():
                shutil.copyfile(other, mine)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(folder: Path, target: Path) -> None:
    """Copy a folder's files. Those of this user are linked instead, because nothing writes to a finished model."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _link_or_copy(path, copy)


def _link_or_copy(path: Path, copy: Path) -> None:
    if path.stat().st_uid == os.geteuid() and not path.is_symlink():
        with suppress(OSError):  # another file system, or one without links
            copy.hardlink_to(path)
            return
    shutil.copyfile(path, copy)


def _modified(spec: JobSpec, stage: str, other: RunDir) -> Iterator[str]:
    """The local data and models that were modified since the first stage that used them was finished."""
    stages = with_needs(spec, stage)
    manifests = [other.stage(each).model / manifest.NAME for each in stages]
    finished = min(path.stat().st_mtime for path in manifests if path.exists())
    sources = {
        path: each.path or (each.feedback and str(RunDir(Path(each.feedback)).feedback))
        for path, each in spec.sources.items()
        if path.split(".")[1] in ("sources", *stages)
    }
    models = {f"models.{name}": ref for name, ref in inputs(spec, stage)["models"].items() if isinstance(ref, str)}
    for field, path in {**sources, **models}.items():
        if path is not None and Path(path).is_absolute() and _newest(Path(path)) > finished:
            yield f"{field}: {path} was modified since"


def _newest(path: Path) -> float:
    """When the newest file of a file or folder was modified; 0 if it is gone."""
    try:
        return max((each.stat().st_mtime for each in (path, *path.rglob("*")) if each.is_file()), default=0.0)
    except FileNotFoundError:
        return 0.0
