"""The training curves of a stage, from its metrics. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpc_rlhf.observe.metrics import Row, held_out_rows, step_rows
from hpc_rlhf.run.format import number
from hpc_rlhf.spec.stages import Plot, kind_of

# About how many points a curve keeps: more than a chart has pixels across.
MAX_POINTS = 600
_HELD_OUT = "held out"

Values = Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A chart as the page draws it.

    Attributes:
        steps: (points,) x coordinates.
        lines: the curves by label, each (points,); None where it has no value.
        description: the curves in words, for screen readers.
    """

    plot: Plot
    steps: list[int]
    lines: dict[str, Values]
    description: str

    def to_dict(self) -> dict[str, object]:
        """What the page's script draws."""
        plot = {"title": self.plot.title, "unit": self.plot.unit, "log": self.plot.log}
        dots = [label for label in self.lines if label.startswith(_HELD_OUT)]
        return {**plot, "description": self.description, "steps": self.steps, "lines": self.lines, "dots": dots}


def make_charts(text: str, stage: str, samples: int, starts: Iterable[float]) -> list[Chart]:
    """The charts of a stage that have data.

    Args:
        text: its metrics file.
        samples: samples in a step, over all ranks.
        starts: when its attempts began, in Unix seconds.
    """
    rows = step_rows(text, stage)
    held_out = held_out_rows(text)
    _add_throughput(rows, held_out, samples, list(starts))
    charts = (_make_chart(plot, rows, held_out) for plot in kind_of(stage).plots)
    return [chart for chart in charts if chart is not None]


def _make_chart(plot: Plot, rows: Sequence[Row], held_out: Sequence[Row]) -> Chart | None:
    named = {name for row in rows for name in row.values if plot.parts and name.startswith(plot.parts)}
    parts = {name: name.removeprefix(plot.parts) for name in sorted(named) if len(named) > 1}
    curves = {label: [_value(row, name) for row in rows] for name, label in {**plot.lines, **parts}.items()}
    curves = {label: values for label, values in curves.items() if set(values) - {None}}
    measured = _measured(plot, held_out)
    if not (curves or measured):
        return None
    points = {rows[index].step: index for index in thin(list(curves.values()))}
    steps = sorted({*points, *(step for values in measured.values() for step in values)})
    lines: dict[str, Values] = {
        label: [values[points[step]] if step in points else None for step in steps] for label, values in curves.items()
    }
    descriptions = [_describe(label, values) for label, values in curves.items()]
    for label, values in measured.items():
        lines[label] = [values.get(step) for step in steps]
        descriptions.append(_describe(label, [values[step] for step in sorted(values)]))
    return Chart(plot, steps, lines, "; ".join(descriptions))


def _measured(plot: Plot, held_out: Sequence[Row]) -> dict[str, dict[int, float]]:
    """The held-out measurements of a chart, by label and step: of the metric, and of its parts if there are several."""
    if not plot.held_out:
        return {}
    prefix = f"{plot.held_out}/"
    parts = sorted({name for row in held_out for name in row.values if name.startswith(prefix)})
    labels = {plot.held_out: _HELD_OUT}
    labels |= {name: f"{_HELD_OUT}, {name.removeprefix(prefix)}" for name in parts if len(parts) > 1}
    measured = {}
    for name, label in labels.items():
        values = {row.step: _value(row, name) for row in held_out}
        if known := {step: value for step, value in values.items() if value is not None}:
            measured[label] = known
    return measured


def thin(curves: Sequence[Values]) -> list[int]:
    """The indices of the points to draw of curves over the same steps, in order; all if there are at most MAX_POINTS.

    Keeps the first and last point, and each curve's minimum and maximum in each of MAX_POINTS / 2 equal intervals, so
    that no spike is lost.
    """
    length = len(curves[0]) if curves else 0
    if length <= MAX_POINTS:
        return list(range(length))
    width = -(-length // (MAX_POINTS // 2))
    chosen = {0, length - 1}
    for start in range(0, length, width):
        for curve in curves:
            interval = enumerate(curve[start : start + width], start)
            known = [(value, index) for index, value in interval if value is not None]
            if known:
                chosen |= {min(known)[1], max(known)[1]}
    return sorted(chosen)


def _describe(label: str, values: Values) -> str:
    known = [value for value in values if value is not None]
    lowest, highest = number(min(known)), number(max(known))
    return f"{label} from {number(known[0])} to {number(known[-1])}, between {lowest} and {highest}"


def _add_throughput(rows: list[Row], held_out: list[Row], samples: int, starts: list[float]) -> None:
    """Add each row's throughput since the row before in the same attempt, without evaluations."""
    evaluated = {row.step: row.time for row in held_out}
    for before, row in pairwise(rows):
        seconds, steps = row.time - max(before.time, evaluated.get(before.step, 0.0)), row.step - before.step
        if seconds > 0 and steps > 0 and not any(before.time < start <= row.time for start in starts):
            row.values["throughput"] = samples * steps / seconds


def _value(row: Row, name: str) -> float | None:
    """A metric of a row; None if it is missing or not finite."""
    value = row.values.get(name)
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
