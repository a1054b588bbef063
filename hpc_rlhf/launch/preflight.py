"""What speaks against submitting a run: stages that do not fit their GPUs, and a disk without the space they need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hpc_rlhf.launch.doctor import fit, storage
from hpc_rlhf.launch.doctor.finding import Finding
from hpc_rlhf.run import manifest
from hpc_rlhf.run.history import OUTCOMES, StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.sweep import Sweep, lenders


def objections(spec: JobSpec | Sweep, reused: Mapping[str, Collection[str]] | None = None) -> list[Finding]:
    """The doctor's warnings and errors about the GPUs and the disk of the stages that are yet to be submitted.

    Runs of a sweep share a disk, and the stages that one of them trains for others.

    Args:
        reused: stages that each run takes from another one, by its name in a sweep, or "".
    """
    specs, lent = (spec.specs, lenders(spec.specs)) if isinstance(spec, Sweep) else ({"": spec}, {})
    found: dict[Finding, None] = {}
    needed: list[int | None] = []
    for name, one in specs.items():
        run = RunDir(Path(one.run_dir))
        stages = [
            stage
            for stage in _missing(one, run)
            if (name, stage) not in lent and stage not in (reused or {}).get(name, ())
        ]
        found |= dict.fromkeys(fit.check(one, stages))
        if stages:
            needed.append(storage.bytes_needed(one, run, stages))
    if needed:
        known = [each for each in needed if each is not None]
        total = sum(known) if len(known) == len(needed) else None
        if isinstance(spec, Sweep) and spec.search is not None and total is not None:
            total = total * spec.search.spec.trials // len(specs)  # the specs are corners of its space
        found[storage.check_space(storage.nearest(Path(spec.run_dir)), total)] = None
    return [finding for finding in found if finding.level != "ok"]


def sentence(finding: Finding) -> str:
    """A finding for a message of its own."""
    return f"{finding.check if finding.where == 'here' else finding.where}: {finding.message} ({finding.fix})"


def _missing(spec: JobSpec, run: RunDir) -> Sequence[str]:
    """The stages that are neither done nor, by the ledger, queued or running."""
    states = {stage: StageHistory.read(run, stage).state for stage in spec.stage_names}
    return [
        stage
        for stage, state in states.items()
        if not manifest.is_done(run.stage(stage)) and (state is None or isinstance(state, OUTCOMES))
    ]
