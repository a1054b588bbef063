"""Many runs at a glance: each in one line, from small reads, and from two questions to Slurm for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.metrics import seconds_a_step, step_rows
from hpc_rlhf.observe.status import Answer, Evidence, ask_slurm, gather, judge, read_plan
from hpc_rlhf.run.attempt_logs import read_tail
from hpc_rlhf.run.events import Event, Started, Submitted, parse
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger

# What a whole run is said to be is what the most telling of its stages is.
_TELLING = (
    "failed", "stopped", "refused", "stuck", "cancelled", "unknown", "interrupted",
    "running", "starting", "stopping", "completing", "suspended", "requeued", "pending", "waiting", "not started",
)  # fmt: skip
_DEPTH = 2  # folders below the one given


@dataclass(frozen=True)
class RunLine:
    """One run.

    Attributes:
        name: the run's.
        path: its directory.
        state: done, or that of the stage that tells most: what failed before what runs, and that before what waits.
        stage: that stage; None when the run is done.
        why: more about the state; may be empty.
        done: how many of its stages are done.
        stages: how many it has.
        step: of that stage, or None before its first.
        total_steps: of that stage.
        left: seconds of work that are left to that stage, at its pace; None where that cannot be told.
        updated: when anything last happened, in Unix seconds.
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
    """The run directories that folders are or hold, up to two folders deep."""
    found: dict[Path, RunDir] = {}
    for folder in folders:
        for path in _runs_in(folder.absolute(), _DEPTH):
            found[path.resolve()] = RunDir(path)
    return list(found.values())


def _runs_in(folder: Path, depth: int) -> list[Path]:
    if RunDir(folder).job_yaml.is_file() and RunDir(folder).plan_json.is_file():
        return [folder]
    try:
        inside = (
            sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
            if depth
            else []
        )
    except OSError:
        return []
    return [run for path in inside for run in _runs_in(path, depth - 1)]


def list_runs(runs: Iterable[RunDir]) -> list[RunLine]:
    """A line for each run, those where something happened last first. One whose plan cannot be read is passed over."""
    read = [facts for facts in map(_read, runs) if facts is not None]
    # Everybody's jobs are asked for at once: first it is gathered which, then each run takes its share of the answer.
    wanted: list[str] = []

    def note(job_ids: Sequence[str]) -> Answer:
        wanted.extend(job_ids)
        return {}, {}, ""

    for run, plan, events in read:
        gather(run, plan, events, note)
    answer = ask_slurm(wanted)
    lines = [_line(run, plan, events, answer) for run, plan, events in read]
    return sorted(lines, key=lambda line: -(line.updated or 0.0))


def _read(run: RunDir) -> tuple[RunDir, dict[str, Any], list[Event]] | None:
    try:
        plan = read_plan(run)
    except HpcRlhfError:
        return None
    stages = [job["stage"] for job in plan["jobs"]]
    events = list(parse(read_tail(run.ledger)))
    begun = {event.stage for event in events if isinstance(event, (Submitted, Started))}
    if not begun.issuperset(stages):  # a long ledger's tail may lack how a stage began
        events = list(Ledger(run.ledger).events())
    return run, plan, events


def _line(run: RunDir, plan: Mapping[str, Any], events: Sequence[Event], answer: Answer) -> RunLine:
    evidence, silence = gather(run, plan, events, lambda job_ids: answer)
    judged = {stage: judge(known) for stage, known in evidence.items()}
    open_ = [stage for stage in judged if judged[stage][0] != "done"]
    stage = min(open_, key=lambda name: _rank(judged[name][0]), default=None)
    state, why = ("done", "") if stage is None else judged[stage]
    if stage is not None and silence and evidence[stage].job_id is not None:
        why = silence
    step, total, left, seen = (
        (None, None, None, None) if stage is None else _progress(run, stage, evidence[stage])
    )
    times = [time for time in (seen, events[-1].time if events else None) if time is not None]
    return RunLine(
        str(plan["name"]), str(run.path), state, stage, why.partition("\n")[0],
        len(judged) - len(open_), len(judged), step, total, left, max(times, default=None),
    )  # fmt: skip


def _rank(state: str) -> int:
    return _TELLING.index(state) if state in _TELLING else 0


def _progress(
    run: RunDir, stage: str, evidence: Evidence
) -> tuple[int | None, int | None, float | None, float | None]:
    rows = step_rows(read_tail(run.stage(stage).metrics), stage)
    if not rows:
        return None, None, None, None
    row = rows[-1]
    pace = seconds_a_step(rows, [event.time for event in evidence.history.all(Started)])
    left = None if pace is None else round(pace * (row["total_steps"] - row["step"]), 1)
    return row["step"], row["total_steps"], left, row["time"]
