"""A run at a glance: a table of its stages, notes on what each waits for or was interrupted by, and sparklines."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hpc_rlhf.observe.goodput.spans import count_words, split_words, total
from hpc_rlhf.observe.status import StageStatus
from hpc_rlhf.observe.terminal.tables import STYLES, grid, styled
from hpc_rlhf.run.format import ago, duration, listed, number
from hpc_rlhf.run.row_counts import Kind
from hpc_rlhf.spec.stages import kind_of

_WIDE = 100  # terminal columns that have room for a bar, all metrics and the job
_LEAST = 3  # columns of the table that are always shown
_BAR = 10
_BARS = ("━", "─")
_BARS_ASCII = ("#", "-")
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARKS_ASCII = "_.-=+*%#"
_SILENT = 120.0  # seconds without a step that are worth a note


class Board:
    """The parts of the display, for a console of a given width.

    Args:
        width: columns of the console.
        live: it is a terminal, which shows bars.
        ascii_only: it cannot show other characters.
    """

    def __init__(self, width: int, live: bool, ascii_only: bool = False) -> None:
        self._wide = width >= _WIDE
        self._width, self._live, self._ascii_only = width, live, ascii_only

    def whole(self, stages: Sequence[StageStatus]) -> list[RenderableType]:
        """The table, the notes and where the time went."""
        parts: list[RenderableType] = [self.table(stages)]
        notes = self.notes(stages)
        if notes is not None:
            parts += [Text(), notes]
        split = split_words(total({stage.stage: stage.goodput for stage in stages}).spans)
        return [*parts, Text(), Text(split)] if split else parts

    def table(self, stages: Sequence[StageStatus]) -> Table:
        """A row for each stage. On a narrow console, whole columns are left out from the right."""
        names = ("stage", "state", "progress", "time", "last", "attempts" if self._wide else "tries", "job")
        rows = [
            (
                Text(stage.stage),
                styled(stage.state),
                self._progress(stage),
                Text(_time(stage)),
                Text(self._last(stage)),
                Text(str(stage.attempts or "-")),
                Text(stage.job_id or "-"),
            )
            for stage in stages
        ]
        widths = [max([len(name), *(row[column].cell_len for row in rows)]) for column, name in enumerate(names)]
        shown = len(names)
        while sum(widths[:shown]) + 2 * (shown - 1) > self._width and shown > _LEAST:
            shown -= 1
        table = grid(*names[:shown])
        for column in table.columns:
            column.no_wrap, column.overflow = True, "ellipsis"
        for row in rows:
            table.add_row(*row[:shown])
        return table

    def notes(self, stages: Sequence[StageStatus]) -> RenderableType | None:
        """The reason for each stage's state, and its interruptions; None if there are none."""
        left = {stage.stage: stage.left for stage in stages}
        table = grid("", "")
        table.columns[0].no_wrap = True
        for stage in stages:
            for note in _notes(stage, left):
                table.add_row(stage.stage, Text(note))
        return table if table.row_count else None

    def curves(self, values: Mapping[tuple[str, str], Sequence[float]]) -> RenderableType | None:
        """A sparkline for each (stage, metric), from first to last value; None before the first step."""
        table = grid(*[""] * 5)
        table.columns[2].justify = "right"
        for column in table.columns:
            column.no_wrap = True
        longest = max((len(name) for _, name in values), default=0)
        width = max(8, min(80, self._width - 6 - longest - 2 * 9 - 4 * 2))
        shown = ""
        for (stage, name), line in values.items():
            if line:
                curve = Text(sparks(line, width, _SPARKS_ASCII if self._ascii_only else _SPARKS), style="cyan")
                table.add_row(stage if stage != shown else "", name, number(line[0]), curve, number(line[-1]))
                shown = stage
        return table if table.row_count else None

    def _progress(self, stage: StageStatus) -> Text:
        if stage.step is None or not stage.total_steps:
            return Text("-")
        count = f"{stage.step}/{stage.total_steps}"
        if not self._wide:
            return Text(count)
        share = min(1.0, stage.step / stage.total_steps)
        text = Text()
        if self._live:
            full, empty = _BARS_ASCII if self._ascii_only else _BARS
            filled = int(share * _BAR)
            text.append(full * filled, style=STYLES.get(stage.state, ""))
            text.append(empty * (_BAR - filled), style="dim").append(" ")
        return text.append(f"{count} {int(share * 100)}%")

    def _last(self, stage: StageStatus) -> str:
        numbers = list(stage.numbers.items())[: None if self._wide else 1]
        return "  ".join(f"{name} {number(value)}" for name, value in numbers) or "-"


def sparks(values: Sequence[float], width: int, glyphs: str = _SPARKS) -> str:
    """A sparkline: the means of at most ``width`` equal parts, scaled between their minimum and maximum."""
    if not values:
        return ""
    cells = min(width, len(values))
    edges = [len(values) * cell // cells for cell in range(cells + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return glyphs[len(glyphs) // 2] * cells
    return "".join(glyphs[min(len(glyphs) - 1, int((mean - low) / (high - low) * len(glyphs)))] for mean in means)


def _time(stage: StageStatus) -> str:
    """How long the stage took, or has left."""
    if stage.state == "done":
        allocated = stage.goodput.spans.allocated
        return f"took {duration(allocated)}" if allocated else "-"
    return "-" if stage.left is None else f"{duration(stage.left)} left"


def _notes(stage: StageStatus, left: Mapping[str, float | None]) -> Iterator[str]:
    """The reason for a stage's state, its interruptions, and the rows that it lost or changed."""
    why = stage.why.partition("\n")[0]
    if stage.state == "waiting":
        needs = re.split(", | and ", why.removeprefix("for "))
        in_words = [need if (rest := left.get(need)) is None else f"{need} ({duration(rest)} left)" for need in needs]
        why = f"waiting for {listed(in_words)}"
    elif stage.state == "running" and not why and stage.updated:
        silent = time.time() - stage.updated
        why = f"latest step {ago(silent)}" if silent > _SILENT else ""
    if why:
        yield why
    interruptions = stage.goodput.interruptions
    if interruptions:
        last = interruptions[-1]
        where = f" on {last.node}" if last.node else ""
        latest = f"latest: {last.reason} at step {last.step}{where}, {ago(time.time() - last.time)}"
        yield f"{count_words(interruptions)}; {latest}"
    if stage.state == "running" and stage.held_out.get("step"):
        yield f"held out, {_evaluation(stage.stage, stage.held_out)}"
    for counts in stage.data:
        lost = counts.describe(Kind.LOST, Kind.LOST_HERE, Kind.CHANGED)
        if lost:
            yield f"data: {counts.source}, {counts.read:,} rows: {lost}"


def _evaluation(stage: str, held_out: Mapping[str, float | None]) -> str:
    """Such as: at step 200: perplexity 1.44; best at step 100."""
    metrics = ", ".join(f"{name} {number(held_out[name])}" for name in kind_of(stage).held_out if name in held_out)
    best = held_out.get("best_step")
    return f"at step {held_out['step']}: {metrics}" + (f"; best at step {best}" if best else "")
