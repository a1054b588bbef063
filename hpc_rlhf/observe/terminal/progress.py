"""The progress of `hpc-rlhf run`, from its directory: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from hpc_rlhf.observe.metrics import MetricsReader, Row
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.observe.terminal.tables import SafeConsole
from hpc_rlhf.run.events import Resumed, Started
from hpc_rlhf.run.format import duration, number
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import kind_of

_LINE_EVERY = 600.0  # seconds between plain lines, at most
_LEDGER_EVERY = 1.0


@dataclass
class StageView:
    """The progress of one attempt at a stage, read from its files. `update` reads what is new.

    Attributes:
        total: steps of the whole stage, once this attempt has done one.
    """

    run: RunDir
    stage: str
    ranks: int
    began: float = field(default_factory=time.time)
    phase: str = ""
    step: int = 0
    total: int | None = None
    _first: Row | None = None
    _last: Row | None = None
    _ledger_read: float = 0.0

    def __post_init__(self) -> None:
        self._metrics = MetricsReader(self.run.stage(self.stage).metrics, self.stage)
        self._events_before = len(StageHistory.read(self.run, self.stage).events)

    def update(self) -> None:
        for row in self._metrics.read_new()[0]:
            if row.time >= self.began:
                self._first = self._first or row
                self._last = row
                self.step, self.total = row.step, row.total_steps
        if self._first is None and time.monotonic() - self._ledger_read > _LEDGER_EVERY:
            self._ledger_read = time.monotonic()
            event = StageHistory.read(self.run, self.stage).after(self._events_before).last(Started, Resumed)
            if isinstance(event, Resumed):
                self.phase = f"resuming from step {event.step}"
            elif event is not None:
                self.phase = "loading data and model"
            else:
                self.phase = f"starting {self.ranks} rank{'s' if self.ranks > 1 else ''}"

    def words(self) -> str:
        """The progress metrics, the speed and the time left; before the first step, the phase."""
        first, last = self._first, self._last
        if first is None or last is None:
            return self.phase
        kind = kind_of(self.stage)
        words = [f"{name} {number(last.values[name])}" for name in kind.shown(last.values)]
        steps, seconds = last.step - first.step, last.time - first.time
        if steps > 0 and seconds > 0:
            rate = steps / seconds
            if kind.trains:
                words.append(f"{number(rate)} steps/s" if rate >= 1 else f"{number(1 / rate)} s per step")
            if last.step < last.total_steps:
                words.append(f"{duration((last.total_steps - last.step) / rate)} left")
        return ", ".join(words)


class PlainProgress:
    """Prints a line when a stage starts, at every tenth of it, and when it ends."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._view: StageView | None = None
        self._tenth = 0
        self._phase = ""
        self._printed = 0.0

    def skipped(self, stage: str) -> None:
        self.say(f"{stage}: already finished")

    def started(self, stage: str, ranks: int) -> None:
        self._view, self._tenth, self._phase = StageView(self._run, stage, ranks), 0, ""
        self.tick()

    def tick(self) -> None:
        view = self._view
        if view is None:
            return
        view.update()
        if view.total is None:
            if view.phase != self._phase:
                self._phase = view.phase
                self.say(f"{view.stage}: {view.phase}")
            return
        tenth = view.step * 10 // view.total
        if tenth > self._tenth or time.monotonic() - self._printed > _LINE_EVERY:
            self._tenth = tenth
            self.say(f"{view.stage}: {kind_of(view.stage).unit} {view.step}/{view.total}, {view.words()}")

    def finished(self, stage: str) -> None:
        assert self._view is not None
        self.say(f"{stage}: finished in {duration(time.time() - self._view.began)}")

    def say(self, text: str) -> None:
        self._printed = time.monotonic()
        print(printable(text), file=sys.stderr, flush=True)


class LiveProgress:
    """Draws a bar for each stage, in place."""

    def __init__(self, run: RunDir, bars: Progress) -> None:
        self._run, self._bars = run, bars
        self._view: StageView | None = None
        self._task: TaskID | None = None

    def skipped(self, stage: str) -> None:
        self._bars.add_task(stage, total=1, completed=1, count="", words="already finished")

    def started(self, stage: str, ranks: int) -> None:
        self._view = StageView(self._run, stage, ranks)
        self._task = self._bars.add_task(stage, total=None, count="", words="")
        self.tick()

    def tick(self) -> None:
        view = self._view
        if view is None or self._task is None:
            return
        view.update()
        count = "" if view.total is None else f"{view.step}/{view.total}"
        self._bars.update(self._task, total=view.total, completed=view.step, count=count, words=view.words())

    def finished(self, stage: str) -> None:
        assert self._view is not None
        assert self._task is not None
        total = self._view.total or 1
        took = f"finished in {duration(time.time() - self._view.began)}"
        self._bars.update(self._task, total=total, completed=total, words=took)

    def say(self, text: str) -> None:
        self._bars.console.print(text, markup=False)


@contextmanager
def progress(run: RunDir) -> Iterator[PlainProgress | LiveProgress]:
    """The kind of progress that suits stderr."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield PlainProgress(run)
        return
    with Progress(
        TextColumn("{task.description:<6}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[words]}", markup=False),
        console=SafeConsole(stderr=True),
        refresh_per_second=5,
    ) as bars:
        yield LiveProgress(run, bars)
