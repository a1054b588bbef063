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

from hpc_rlhf.observe.gather import Evidence, RunRecord, SlurmWatch
from hpc_rlhf.observe.goodput.spans import count_words, total
from hpc_rlhf.observe.listing import RunLine, find_runs, summarize
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.observe.status import StageStatus, judge, run_goodput, run_statuses
from hpc_rlhf.run import manifest
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
        files: those that the record and the progress are read from, and ``facts`` about them at that time.
        states: of its stages and their reasons, from which ``row`` was made.
    """

    record: RunRecord
    files: list[Path]
    facts: list[FileFacts]
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    row: Row | None = None


class Board:
    """Reads the runs below a folder. Several threads may ask it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._lock = threading.Lock()
        self._slurm = SlurmWatch()
        self._runs: list[RunDir] = []
        self._known: dict[Path, _Known] = {}
        self._rows: list[Row] = []
        self._searched = self._read = -math.inf

    def rows(self) -> tuple[list[Row], int]:
        """A row for each run, the most recently active first, and the number of runs that cannot be read."""
        with self._lock:
            if time.monotonic() - self._searched > _FIND_EVERY:
                self._runs, self._searched = find_runs([self.folder]), time.monotonic()
            if time.monotonic() - self._read > _READ_EVERY:
                self._read_rows()
                self._read = time.monotonic()
            return self._rows, len(self._runs) - len(self._rows)

    def statuses(self, row: Row) -> tuple[RunRecord, list[StageStatus]]:
        """The record of a run of ``rows`` and the status of its stages."""
        with self._lock:
            record = self._known[Path(row.line.path)].record
            return record, run_statuses(record, record.evidence(self._slurm.reply))

    def _read_rows(self) -> None:
        known = {run.path: each for run in self._runs if (each := self._look(run)) is not None}
        self._known = known
        reply = self._slurm.query([job_id for each in known.values() for job_id in each.record.job_ids])
        names = Counter(each.record.plan.name for each in known.values())
        rows = [self._row(each, each.record.evidence(reply), names) for each in known.values()]
        self._rows = sorted(filter(None, rows), key=lambda row: -(row.line.updated or 0.0))

    def _look(self, run: RunDir) -> _Known | None:
        """What is known about a run, read again if its files have changed; None if it cannot be read."""
        known = self._known.get(run.path)
        if known is not None and [*map(file_facts, known.files)] == known.facts:
            return known
        try:
            record = RunRecord.read(run)
            files = _files(record)
            return _Known(record, files, [*map(file_facts, files)])
        except Exception:  # one damaged run must not hide the others
            return None

    def _row(self, known: _Known, evidence: dict[str, Evidence], names: Counter[str]) -> Row | None:
        """The row of a run, made again if it can have changed; None if its files hold nonsense."""
        states = {stage: judge(each) for stage, each in evidence.items()}
        unchanging = {_GROUPS.get(state) for state, _ in states.values()} <= {"done", None}
        if known.row is None or known.states != states or not unchanging:
            with suppress(Exception):  # one damaged run must not hide the others
                known.row = self._make_row(
                    known.record, evidence, {stage: state for stage, (state, _) in states.items()}, names
                )
            known.states = states
        return known.row

    def _make_row(
        self, record: RunRecord, evidence: dict[str, Evidence], states: dict[str, str], names: Counter[str]
    ) -> Row:
        line, goodput = summarize(record, evidence), total(run_goodput(record, states))
        place = os.path.relpath(line.path, self.folder)
        return Row(
            id=hashlib.sha256(os.fsencode(line.path)).hexdigest()[:16],
            label=printable(line.name if names[line.name] == 1 else f"{line.name} ({place})"),
            place=place,
            line=line,
            group=_GROUPS.get(line.state, "stopped"),
            progress=_progress(line),
            left="" if line.left is None else duration(line.left),
            ettr=goodput.spans.ettr,
            interruptions=count_words(goodput.interruptions),
        )


def _files(record: RunRecord) -> list[Path]:
    run = record.run
    lenders = [lender.ledger for stage in record.histories if (lender := run.lender(stage)) is not None]
    stages = [run.stage(stage) for stage in record.histories]
    manifests, metrics = [stage.model / manifest.NAME for stage in stages], [stage.metrics for stage in stages]
    return [run.plan_json, run.ledger, *lenders, *manifests, *metrics]


def _progress(line: RunLine) -> float:
    current = (line.step or 0) / line.total_steps if line.total_steps else 0.0
    return round((line.done + current) / max(1, line.stages), 4)


def chosen(rows: Sequence[Row], ids: Collection[str]) -> list[Row]:
    """The rows with some ids, in the order of these."""
    by_id = {row.id: row for row in rows}
    return [by_id[each] for each in dict.fromkeys(ids) if each in by_id]
