"""What the dashboard shows of the chosen runs: their curves overlaid, where their time went, and their evaluations and
responses side by side.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe import results
from hpc_rlhf.observe.dashboard.board import Board, FileFacts, Row, file_facts
from hpc_rlhf.observe.goodput.spans import count_words, split_words, total
from hpc_rlhf.observe.report import timeline
from hpc_rlhf.observe.report.comparison import Curve, find_curves, overlay
from hpc_rlhf.observe.report.rendering import render
from hpc_rlhf.observe.report.responses import MODELS, read_exchanges
from hpc_rlhf.observe.results import Report
from hpc_rlhf.run.events import Started
from hpc_rlhf.run.format import listed
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import STAGE_KINDS

# Models of an evaluation that no stage makes.
_GIVEN = ("start", "reference")
_KEPT = 24  # sets of charts: of a stage and the runs chosen
_Exchanges = list[tuple[str, list[tuple[str, str, str]]]]


@dataclass(frozen=True)
class _Made:
    """The charts of a stage, the facts about its metrics files just before, and until when they are new enough."""

    charts: list[dict[str, object]]
    facts: list[FileFacts]
    until: float


class Details:
    """Describes chosen runs of a board. Charts are made again when metrics change, in a tenth of the time at most."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._made: dict[tuple[str, tuple[Curve, ...]], _Made] = {}

    def describe(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The details of the chosen runs, as the page shows them.

        Returns:
            ``charts`` by stage, as ``overlay`` makes them; ``times``, for each run its time in words and its timeline
            as HTML; ``evaluation`` and ``responses`` as HTML, empty if no run has any.
        """
        runs = {row.label: RunDir(Path(row.line.path)) for row in rows}
        reports = {label: report for label, run in runs.items() if (report := _report(run)) is not None}
        table, notes = _evaluation(reports)
        exchanges = _exchanges(runs)
        return {
            "charts": self._charts(runs),
            "times": [_time(self.board, row) for row in rows],
            "evaluation": render("evaluation.html.j2", table=table, notes=notes) if table or notes else "",
            "responses": render("responses.html.j2", exchanges=exchanges) if exchanges else "",
        }

    def _charts(self, runs: Mapping[str, RunDir]) -> dict[str, list[dict[str, object]]]:
        charts = {}
        for kind in STAGE_KINDS:
            if kind.trains and (curves := find_curves(kind.name, runs)):
                charts[kind.name] = self._overlay(kind.name, curves)
        return {stage: of_stage for stage, of_stage in charts.items() if of_stage}

    def _overlay(self, stage: str, curves: tuple[Curve, ...]) -> list[dict[str, object]]:
        facts, began = [file_facts(curve.metrics) for curve in curves], time.monotonic()
        entry = self._made.pop((stage, curves), None)
        if entry is None or (entry.facts != facts and began > entry.until):
            charts = overlay(stage, curves)
            now = time.monotonic()
            entry = _Made(charts, facts, now + 9 * (now - began))
        self._made[stage, curves] = entry
        for oldest in list(self._made)[:-_KEPT]:
            self._made.pop(oldest, None)
        return entry.charts


def _time(board: Board, row: Row) -> dict[str, str]:
    record, statuses = board.statuses(row)
    goodput = {status.stage: status.goodput for status in statuses}
    whole = total(goodput)
    bars = timeline.make_timeline(
        goodput,
        {status.stage: "finished" if status.state == "done" else status.state for status in statuses},
        {event.attempt: event.host for event in record.events if isinstance(event, Started)},
    )
    html = render(
        "timeline.html.j2",
        name=row.label,
        timeline=bars,
        statuses=statuses,
        spans=timeline.TITLES,
        width=timeline.WIDTH,
    )
    return {
        "id": row.id,
        "label": row.label,
        "words": ". ".join(filter(None, (split_words(whole.spans), count_words(whole.interruptions)))) or "Not started",
        "html": html if bars.bars else "",
    }


def _report(run: RunDir) -> Report | None:
    try:
        return results.read_report(run)
    except HpcRlhfError:
        return None


def _evaluation(reports: Mapping[str, Report]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The table and its notes: all models of one run, or the final models of several."""
    if len(reports) < 2:
        return next(((results.table_rows(each, MODELS), results.notes(each)) for each in reports.values()), ([], []))
    models = {}
    for label, report in reports.items():
        if trained := [name for name in MODELS if name in report["models"] and name not in _GIVEN]:
            models[f"{label}: {MODELS[trained[-1]]}"] = report["models"][trained[-1]]
    bases = {MODELS.get(report["base"], report["base"]) for report in reports.values()}
    base = bases.pop() if len(bases) == 1 else "the base of its run"
    table = results.table_rows({**next(iter(reports.values())), "base": base, "models": models})
    of_runs: dict[str, list[str]] = {}
    for label, report in reports.items():
        for note in results.notes(report):
            of_runs.setdefault(note, []).append(label)
    notes = [note if len(labels) == len(reports) else f"{listed(labels)}: {note}" for note, labels in of_runs.items()]
    return table, ["Rewards, gains and wins compare only between runs with the same reward model and base.", *notes]


def _exchanges(runs: Mapping[str, RunDir]) -> _Exchanges:
    """Prompts and responses: those of all models of one run, or those of the final models of several."""
    by_run = {label: read_exchanges(run) for label, run in runs.items()}
    if len(by_run) == 1:
        return next(iter(by_run.values()))
    merged: dict[str, list[tuple[str, str, str]]] = {}
    for label, exchanges in by_run.items():
        for prompt, responses in exchanges:
            own = [each for each in responses if each[0] != MODELS["reference"]]
            merged.setdefault(prompt, []).extend(
                (f"{label}: {title}", text, reward) for title, text, reward in own[-1:]
            )
    return sorted(merged.items(), key=lambda exchange: -len(exchange[1]))
