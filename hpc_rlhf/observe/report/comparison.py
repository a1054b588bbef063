"""Write the comparison of runs as a page: their ranking, the fields in which they differ, and their curves overlaid."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from hpc_rlhf.observe.compare import Compared, Comparison
from hpc_rlhf.observe.metrics import Row, all_rows, read_text
from hpc_rlhf.observe.report.charts import Chart, Values
from hpc_rlhf.observe.report.rendering import render
from hpc_rlhf.run.format import number
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import STAGE_KINDS, Plot, kind_of

# At most this many runs are drawn, the best first, with this many points each: more could not be distinguished.
MAX_RUNS, MAX_POINTS = 16, 300


def make_comparison(comparison: Comparison, sentence: str, rows: Sequence[Sequence[str]]) -> str:
    """The page as HTML.

    Args:
        sentence: what the runs are ranked by.
        rows: the table of the runs: a header, then the best first; every row begins with the name of its run.
    """
    drawn = _drawn(comparison.runs)
    curves = {kind.name: find_curves(kind.name, drawn) for kind in STAGE_KINDS if kind.trains}
    charts = {stage: charts for stage, of_stage in curves.items() if (charts := overlay(stage, of_stage))}
    return render(
        "comparison.html.j2",
        title=f"{len(comparison.runs)} runs compared",
        sentence=f"{sentence[:1].upper()}{sentence[1:]}.",
        header=[re.sub("([._])", "\\1\u200b", name) for name in rows[0]],  # where long names may be broken
        rows=rows[1:],
        charts=charts,
        chart_data=[chart for of_stage in charts.values() for chart in of_stage],
        most=MAX_POINTS,
        left_out=max(0, len(comparison.runs) - MAX_RUNS),
    )


def _drawn(runs: Sequence[Compared]) -> dict[str, RunDir]:
    """The runs to draw, by name, or by path where several have the same name."""
    shown = [run.name for run in runs]
    return {run.path if shown.count(run.name) > 1 else run.name: RunDir(Path(run.path)) for run in runs[:MAX_RUNS]}


@dataclass(frozen=True)
class Curve:
    """The metrics of a stage that one run, or several, have.

    Attributes:
        place: of the first of these runs, which decides the colour.
    """

    label: str
    metrics: Path
    place: int


def find_curves(stage: str, runs: Mapping[str, RunDir]) -> tuple[Curve, ...]:
    """The metrics of a stage. Runs that share the stage, as those of a sweep may, have one curve."""
    shared: dict[Path, list[str]] = {}
    for name, run in runs.items():
        if run.stage(stage).metrics.exists():
            shared.setdefault(run.stage(stage).metrics.resolve(), []).append(name)
    places = {name: place for place, name in enumerate(runs)}
    return tuple(Curve(_label(names, len(runs)), path, places[names[0]]) for path, names in shared.items())


def overlay(stage: str, curves: Sequence[Curve]) -> list[dict[str, object]]:
    """The charts of a stage as the page's script draws them."""
    rows = {curve.label: all_rows(read_text(curve.metrics), stage) for curve in curves}
    trained = {label: of_run for label, (of_run, _) in rows.items()}
    held_out = {label: of_run for label, (_, of_run) in rows.items()}
    charts: list[Chart] = []
    for plot in kind_of(stage).plots:
        for metric, label in plot.lines.items():
            title = plot.title if len(plot.lines) == 1 else f"{plot.title}: {label}"
            charts += _overlay(plot, title, metric, trained)
        if plot.held_out:
            charts += _overlay(plot, f"{plot.title}, held out", plot.held_out, held_out)
    places = {curve.label: curve.place for curve in curves}
    return [{**chart.to_dict(), "overlay": True, "places": places} for chart in charts]


def _label(names: Sequence[str], runs: int) -> str:
    """The name of a curve that belongs to some of ``runs`` runs."""
    if len(names) == 1:
        return names[0]
    return "all runs" if len(names) == runs else f"{names[0]} and {len(names) - 1} more"


def _overlay(plot: Plot, title: str, metric: str, rows: Mapping[str, Sequence[Row]]) -> Iterator[Chart]:
    """The chart of a metric, if any run has it. More than MAX_POINTS steps are averaged over equal intervals."""
    known: dict[str, dict[int, float]] = {}
    for label, of_run in rows.items():
        values = {row.step: row.values.get(metric) for row in of_run}
        finite = {step: value for step, value in values.items() if value is not None and math.isfinite(value)}
        if finite:
            known[label] = finite
    steps = sorted({step for values in known.values() for step in values})
    if not steps:
        return
    width = -(-len(steps) // MAX_POINTS)
    parts = [steps[at : at + width] for at in range(0, len(steps), width)]
    lines: dict[str, Values] = {label: [_mean(values, part) for part in parts] for label, values in known.items()}
    ends = ", ".join(f"{label} {number(values[max(values)])}" for label, values in known.items())
    yield Chart(replace(plot, title=title), [part[-1] for part in parts], lines, f"latest values: {ends}")


def _mean(values: Mapping[int, float], steps: Sequence[int]) -> float | None:
    at_steps = [values[step] for step in steps if step in values]
    return float(f"{fmean(at_steps):.5g}") if at_steps else None
