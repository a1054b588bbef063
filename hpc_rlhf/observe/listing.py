"""Many runs, one line each, from small reads and two queries to Slurm for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.gather import Evidence, RunPlan, RunRecord, query_slurm
from hpc_rlhf.observe.status import StageStatus, judge, stage_status
from hpc_rlhf.run.attempt_logs import read_tail
from hpc_rlhf.run.events import Started, Submitted, parse
from hpc_rlhf.run.layout import RunDir

# States of a stage, the most important first: a run has the state of its most important stage.
_IMPORTANCE = {state: place for place, state in enumerate((
    "failed", "stopped", "refused", "stuck", "cancelled", "unknown", "interrupted",
    "running", "starting", "stopping", "completing", "suspended", "requeued", "held", "pending", "waiting",
    "not started",
))}  # fmt: skip
_DEPTH = 2  # how deep a folder is searched for runs


@dataclass(frozen=True)
class RunLine:
    """One run.

    Attributes:
        state: done, or that of its most important stage: one that failed, else one that runs, else one that waits.
        stage: that stage; None if the run is done.
        why: more about the state; may be empty.
        done, stages: numbers of finished stages, and of stages in all.
        step, total_steps: of that stage; None before its first step.
        left: seconds of work left for that stage at its pace; None if unknown.
        updated: time of the last activity, in Unix seconds.
    """

    name: str
    path: str
    state: str
    stage: str | None
    why: str
    done: int
    stages: int
    step: int | None
    total_steps: int | None
    left: float | None
    updated: float | None


def find_runs(folders: Iterable[Path]) -> list[RunDir]:
    """The run directories among folders and below them, up to two levels deep.

    With them are folders that may not be read, because they may be runs; ``list_runs`` leaves them out.
    """
    runs: dict[Path, RunDir] = {}
    for folder in folders:
        for path in _runs_in(folder.absolute(), _DEPTH):
            runs[path.resolve()] = RunDir(path)
    return list(runs.values())


def _runs_in(folder: Path, depth: int) -> list[Path]:
    try:
        if RunDir(folder).job_yaml.is_file() and RunDir(folder).plan_json.is_file():
            return [folder]
        below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()] if depth else []
    except PermissionError:
        return [folder]
    except OSError:
        return []
    return [run for path in sorted(below) for run in _runs_in(path, depth - 1)]


def list_runs(runs: Iterable[RunDir]) -> list[RunLine]:
    """A line for each run, the most recently active first. Those that cannot be read are left out."""
    records = [record for record in map(_read, runs) if record is not None]
    reply = query_slurm([job_id for record in records for job_id in record.job_ids])
    lines = [summarize(record, record.evidence(reply)) for record in records]
    return sorted(lines, key=lambda line: -(line.updated or 0.0))


def _read(run: RunDir) -> RunRecord | None:
    try:
        plan = RunPlan.read(run)
        events = list(parse(read_tail(run.ledger)))
        begun = {event.stage for event in events if isinstance(event, (Submitted, Started))}
        # The tail of a long ledger may lack the first events of a stage.
        complete = begun.issuperset(planned.stage for planned in plan.stages)
        return RunRecord.read(run, plan, events if complete else None)
    except (HpcRlhfError, PermissionError):
        return None


def summarize(record: RunRecord, evidence: Mapping[str, Evidence]) -> RunLine:
    """The line of a run."""
    states = {stage: judge(known)[0] for stage, known in evidence.items()}
    unfinished = [stage for stage, state in states.items() if state != "done"]
    stage = min(unfinished, key=lambda name: _IMPORTANCE.get(states[name], 0), default=None)
    status = StageStatus("", "done") if stage is None else stage_status(record.run, stage, evidence[stage])
    latest = record.events[-1].time if record.events else None
    times = [time for time in (status.updated, latest) if time is not None]
    return RunLine(
        name=record.plan.name,
        path=str(record.run.path),
        state=status.state,
        stage=stage,
        why=status.why.partition("\n")[0],
        done=len(states) - len(unfinished),
        stages=len(states),
        step=status.step,
        total_steps=status.total_steps,
        left=status.left,
        updated=max(times, default=None),
    )
