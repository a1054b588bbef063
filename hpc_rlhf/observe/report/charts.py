"""The curves of a stage, made of the lines of its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hpc_rlhf.observe.format import number
from hpc_rlhf.observe.metrics import Row, held_out_rows, step_rows
from hpc_rlhf.observe.report.thinning import Values, kept
from hpc_rlhf.spec.stages import Plot, kind_of

_HELD_OUT = "held out"


@dataclass(frozen=True)
class Chart:
    """A chart as the page draws it.

    Attributes:
        steps: (points,) where its points are.
        lines: names of the curves, and (points,) the values of each; None where there is none.
        dots: names of those curves that are drawn as dots.
        words: what it shows, for those who cannot see it.
    """

    plot: Plot
    steps: list[int]
    lines: dict[str, Values]
    dots: list[str]
    words: str

    def to_dict(self) -> dict[str, Any]:
        plot = {"title": self.plot.title, "unit": self.plot.unit, "log": self.plot.log}
        return {**plot, "steps": self.steps, "lines": self.lines, "dots": self.dots}


def make_charts(text: str, stage: str, samples: int, starts: Iterable[float]) -> list[Chart]:
    """The charts of a stage for which it has numbers.

    Args:
        text: its metrics file.
        samples: in a step, over all ranks.
        starts: when its attempts began, in Unix seconds.
    """
    rows, held_out = _with_derived(step_rows(text, stage), samples, list(starts)), held_out_rows(text)
    charts = (_make(plot, rows, held_out) for plot in kind_of(stage).plots)
    return [chart for chart in charts if chart is not None]


def _make(plot: Plot, rows: Sequence[Row], held_out: Sequence[Row]) -> Chart | None:
    columns = {label: [_value(row, name) for row in rows] for name, label in plot.lines.items()}
    columns = {
        label: values for label, values in columns.items() if any(value is not None for value in values)
    }
    if not columns:
        return None
    at = kept(list(columns.values()))
    points = {int(rows[place]["step"]): place for place in at}
    measured = {int(row["step"]): _value(row, plot.held_out) for row in held_out if plot.held_out}
    measured = {step: value for step, value in measured.items() if value is not None}
    steps = sorted({*points, *measured})
    lines: dict[str, Values] = {
        label: [values[points[step]] if step in points else None for step in steps]
        for label, values in columns.items()
    }
    said = [_told(label, values) for label, values in columns.items()]
    if measured:
        lines[_HELD_OUT] = [measured.get(step) for step in steps]
        said.append(_told(_HELD_OUT, [measured[step] for step in sorted(measured)]))
    return Chart(plot, steps, lines, [_HELD_OUT] if measured else [], "; ".join(said))


def _told(label: str, values: Values) -> str:
    known = [value for value in values if value is not None]
    lowest, highest = number(min(known)), number(max(known))
    return f"{label} from {number(known[0])} to {number(known[-1])}, between {lowest} and {highest}"


def _with_derived(rows: list[Row], samples: int, starts: list[float]) -> list[Row]:
    """The rows with the perplexity of each, and with the samples a second since the one before in the same attempt."""
    for row in rows:
        loss = _value(row, "loss")
        if loss is not None:
            row["perplexity"] = math.exp(min(loss, 50.0))
    for before, row in pairwise(rows):
        seconds, steps = row["time"] - before["time"], row["step"] - before["step"]
        if seconds > 0 and steps > 0 and not any(before["time"] < start <= row["time"] for start in starts):
            row["throughput"] = samples * steps / seconds
    return rows


def _value(row: Row, name: str) -> float | None:
    """A number of a line; None where there is none, or one that no chart can show."""
    value = row.get(name)
    return float(f"{value:.6g}") if isinstance(value, int | float) and math.isfinite(value) else None
