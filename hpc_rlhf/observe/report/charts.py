"""The curves of a stage, made of the lines of its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hpc_rlhf.observe.format import number
from hpc_rlhf.observe.metrics import Row, step_rows
from hpc_rlhf.observe.report.thinning import Values, kept

_HELD_OUT = "held out"


@dataclass(frozen=True)
class Plot:
    """What a chart shows.

    Attributes:
        title: what it is of.
        unit: of its y axis.
        lines: names in the metrics, and what each curve is called; the name alone stands for the title.
        held_out: the name in the lines of held-out measurements, which are drawn as dots.
        log: whether the y axis is logarithmic.
    """

    title: str
    unit: str
    lines: dict[str, str]
    held_out: str = ""
    log: bool = False


_RATE = Plot("learning rate", "a step", {"lr": "learning rate"})
_GRADIENT = Plot("gradient", "norm before clipping", {"grad_norm": "gradient"})
_THROUGHPUT = Plot("throughput", "samples a second", {"throughput": "throughput"})
_ACCURACY = Plot("accuracy", "share of pairs", {"accuracy": "each step's"}, held_out="accuracy")
_MARGIN = Plot("margin", "reward, chosen above rejected", {"margin": "margin"})
_SENT = Plot("sent by rank 0", "bytes a step", {"bytes_sent": "sent"})

PLOTS: dict[str, tuple[Plot, ...]] = {
    "sft": (
        Plot("loss", "nats a token", {"loss": "loss"}),
        Plot("perplexity", "a token", {"perplexity": "each step's"}, held_out="perplexity", log=True),
        _RATE, _GRADIENT, _THROUGHPUT, _SENT,
    ),
    "reward": (
        Plot("loss", "nats a pair", {"loss": "loss"}),
        _ACCURACY, _MARGIN, _RATE, _GRADIENT, _THROUGHPUT, _SENT,
    ),
    "ppo": (
        Plot("reward", "score of an answer", {"reward": "mean"}),
        Plot("KL from the SFT model", "nats an answer", {"kl": "KL"}),
        Plot("entropy", "nats a token", {"entropy": "entropy"}),
        Plot("length of answers", "tokens", {"answer_tokens": "mean"}),
        Plot("answers that end by themselves", "share", {"eos_rate": "share"}),
        Plot("clip fractions", "share of tokens", {"clipfrac": "actor", "value_clipfrac": "critic"}),
        Plot("move within a step", "nats a token", {"approx_kl": "KL from the sampling actor"}),
        Plot("spread of rewards", "standard deviation", {"reward_std": "spread"}),
        Plot("loss of the actor", "a token", {"actor_loss": "actor"}),
        Plot("loss of the critic", "reward squared", {"critic_loss": "critic"}),
        Plot("explained variance", "share of the returns'", {"explained_variance": "share"}),
        Plot("KL coefficient", "reward a nat", {"kl_coef": "coefficient"}),
        Plot("learning rate of the actor", "a step", {"actor_lr": "learning rate"}),
        _THROUGHPUT, _SENT,
    ),
    "dpo": (
        Plot("loss", "nats a pair", {"loss": "loss"}),
        _ACCURACY,
        _MARGIN,
        Plot("implicit rewards", "nats", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
        _RATE, _GRADIENT, _THROUGHPUT, _SENT,
    ),
}  # fmt: skip


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
    rows, held_out = _with_derived(step_rows(text, stage), samples, list(starts)), step_rows(text, "eval")
    charts = (_make(plot, rows, held_out) for plot in PLOTS.get(stage, ()))
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
