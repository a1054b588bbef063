"""The runs below a folder: what the dashboard lists of each, read again only where files have changed."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpc_rlhf.observe.gather import Evidence, RunPlan, RunRecord, SlurmWatch
from hpc_rlhf.observe.goodput.spans import count_words, total
from hpc_rlhf.observe.listing import RunLine, find_runs, summarize
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.observe.status import StageStatus, judge, run_goodput, run_statuses
from hpc_rlhf.run import acting, manifest
from hpc_rlhf.run.format import duration
from hpc_rlhf.run.layout import RunDir

_FIND_EVERY = 30.0  # seconds between two searches for runs
_READ_EVERY = 1.0  # seconds for which several readers get the same rows
# Groups of states, as the page filters by them; others need the user.
_GROUPS = {"running": "running", "starting": "running", "stopping": "running", "completing": "running",
           "suspended": "waiting", "requeued": "waiting", "held": "waiting", "pending": "waiting",
           "waiting": "waiting", "not started": "waiting", "done": "done"}  # fmt: skip

FileFacts = tuple[int, int, int] | None


def file_facts(path: Path) -> FileFacts:
    """What changes whenever a file does; None if there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


@dataclass(frozen=True)
class Row:
    """A run in the list.

    Attributes:
        id: a hash of its path.
        label: its name, with the place where several runs have the same name.
        place: its path from the folder.
        group: running, waiting, done or stopped.
        progress: the share of its stages that is done, steps of the current one included.
        left: work left for the current stage, in words; empty if unknown.
        ettr: productive time / time in the allocation.
        interruptions: their number and reasons, in words; empty if there was none.
    """

    id: str
    label: str
    place: str
    line: RunLine
    group: str
    progress: float
    left: str
    ettr: float | None
    interruptions: str

    def to_dict(self) -> dict[str, object]:
        """As the page gets it."""
        facts = asdict(self)
        return {**facts.pop("line"), **facts}


@dataclass
class _Known:
    """What is known about a run.

    Attributes:
        owner: its user, if that is another one.
        files: those that the record and the progress are read from, and ``facts`` about them just before.
        states: of its stages and their reasons, from which ``row`` was made.
    """

    record: RunRecord
    owner: str | None
    files: list[Path]
    facts: list[FileFacts]
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    row: Row | None = None


class Board:
    """Reads the runs below a folder. Several threads may ask it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._lock = threading.Lock()
        self._slurm: dict[str | None, SlurmWatch] = {}  # by the owner of runs
        self._runs: list[RunDir] = []
        self._known: dict[Path, _Known] = {}
        self._rows: list[Row] = []
        self._searched = self._read = -math.inf

    def rows(self) -> tuple[list[Row], int]:
        """A row for each run, the most recently active first, and the number of runs that cannot be read."""
        with self._lock:
            if time.monotonic() - self._read > _READ_EVERY:
                if time.monotonic() - self._searched > _FIND_EVERY:
                    self._runs, self._searched = find_runs([self.folder]), time.monotonic()
                self._read_rows()
                self._read = time.monotonic()
            return self._rows, len(self._runs) - len(self._rows)

    def statuses(self, row: Row) -> tuple[RunRecord, list[StageStatus]]:
        """The record of a run of ``rows`` and the status of its stages."""
        with self._lock:
            known = self._known[Path(row.line.path)]
            return known.record, run_statuses(known.record, self._evidence(known))

    def _read_rows(self) -> None:
        self._known = {run.path: each for run in self._runs if (each := self._look(run)) is not None}
        jobs: dict[str | None, list[str]] = {}
        for each in self._known.values():
            jobs.setdefault(each.owner, []).extend(each.record.job_ids)
        for owner, job_ids in jobs.items():
            self._slurm.setdefault(owner, SlurmWatch(owner)).query(job_ids)
        names = Counter(each.record.plan.name for each in self._known.values())
        rows = [self._row(each, names) for each in self._known.values()]
        self._rows = sorted(filter(None, rows), key=lambda row: -(row.line.updated or 0.0))

    def _look(self, run: RunDir) -> _Known | None:
        """What is known about a run, read again if its files have changed; None if it cannot be read."""
        known = self._known.get(run.path)
        if known is not None and [*map(file_facts, known.files)] == known.facts:
            return known
        try:
            plan = RunPlan.read(run)
            files = _files(run, plan)
            facts = [*map(file_facts, files)]
            return _Known(RunRecord.read(run, plan), acting.other_owner(run), files, facts)
        except Exception:  # one damaged run must not hide the others
            return None

    def _evidence(self, known: _Known) -> dict[str, Evidence]:
        return known.record.evidence(self._slurm[known.owner].reply)

    def _row(self, known: _Known, names: Counter[str]) -> Row | None:
        """The row of a run, made again if it can have changed; None if its files hold nonsense."""
        evidence = self._evidence(known)
        states = {stage: judge(each) for stage, each in evidence.items()}
        place = os.path.relpath(known.record.run.path, self.folder)
        name = known.record.plan.name
        label = printable(name if names[name] == 1 else f"{name} ({place})")
        unchanging = {_GROUPS.get(state) for state, _ in states.values()} <= {"done", None}
        if known.row is not None and unchanging and (known.states, known.row.label) == (states, label):
            return known.row
        known.states = states
        with suppress(Exception):  # one damaged run must not hide the others
            line = summarize(known.record, evidence)
            goodput = total(run_goodput(known.record, {stage: state for stage, (state, _) in states.items()}))
            known.row = Row(
                id=hashlib.sha256(os.fsencode(line.path)).hexdigest()[:16],
                label=label,
                place=place,
                line=line,
                group=_GROUPS.get(line.state, "stopped"),
                progress=_progress(line),
                left="" if line.left is None else duration(line.left),
                ettr=goodput.spans.ettr,
                interruptions=count_words(goodput.interruptions),
            )
        return known.row


def _files(run: RunDir, plan: RunPlan) -> list[Path]:
    """The files that tell when a run changes."""
    names = [planned.stage for planned in plan.stages]
    lenders = [lender.ledger for name in names if (lender := run.lender(name)) is not None]
    stages = [run.stage(name) for name in names]
    manifests, metrics = [stage.model / manifest.NAME for stage in stages], [stage.metrics for stage in stages]
    return [run.plan_json, run.ledger, *lenders, *manifests, *metrics]


def _progress(line: RunLine) -> float:
    current = (line.step or 0) / line.total_steps if line.total_steps else 0.0
    return round((line.done + current) / max(1, line.stages), 4)


def chosen(rows: Sequence[Row], ids: Collection[str]) -> list[Row]:
    """The rows with some ids, in the order of these."""
    by_id = {row.id: row for row in rows}
    return [by_id[each] for each in dict.fromkeys(ids) if each in by_id]
