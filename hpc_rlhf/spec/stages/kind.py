"""`StageKind`: what the rest of the code knows about a stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from hpc_rlhf.spec.training import StageSpec, TrainingSpec


class Data(Enum):
    """The data that a stage takes. The values are for messages."""

    ANSWERS = "prompts with responses"
    PAIRS = "pairs of responses"
    LABELED = "responses with a label"  # single ones, and both of a pair
    PROMPTS = "prompts"  # each prompt once and never truncated; chosen responses are kept for comparison
    NONE = "data"  # no share of the prompts
    DOCUMENTS = "documents of plain text"  # of sources of its own, and so no share of the prompts

    @property
    def is_shared(self) -> bool:
        """Whether the stage takes a share of the run's prompts."""
        return self not in (Data.NONE, Data.DOCUMENTS)

    @property
    def answers(self) -> tuple[str, ...]:
        """The responses of a sample that the stage reads."""
        if not self.is_shared:
            return ()
        return ("chosen", "rejected") if self in (Data.PAIRS, Data.LABELED) else ("chosen",)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns of numbers that all its rows have."""
        return ("label",) if self is Data.LABELED else ()


@dataclass(frozen=True)
class Plot:
    """A chart in the report.

    Attributes:
        title: heading of the chart.
        unit: label of its y axis.
        lines: metrics to draw, each with the label of its curve.
        held_out: metric of the held-out measurements, drawn as dots, as are its parts (metrics NAME/PART) if there are
            several.
        parts: beginning of further metrics, which are drawn if there are several, under the rest of their names.
        log: the y axis is logarithmic.
    """

    title: str
    unit: str
    lines: dict[str, str]
    held_out: str = ""
    parts: str = ""
    log: bool = False


# Charts that several stages have.
LEARNING_RATE = Plot("learning rate", "per step", {"lr": "learning rate"})
GRADIENT = Plot("gradient norm", "before clipping", {"grad_norm": "gradient"})
THROUGHPUT = Plot("throughput", "samples per second", {"throughput": "throughput"})
ACCURACY = Plot("accuracy", "fraction of pairs", {"accuracy": "training"}, held_out="accuracy")
MARGIN = Plot("margin", "reward, chosen minus rejected", {"margin": "margin"}, held_out="margin")
SENT = Plot("sent by rank 0", "bytes per step", {"bytes_sent": "sent"})
TRAINING = (LEARNING_RATE, GRADIENT, THROUGHPUT, SENT)


@dataclass(frozen=True)
class StageKind:
    """A stage: its fields, inputs, data and metrics, and what it makes.

    Attributes:
        name: its key in a spec, its folder in a run directory, and its module in ``train/stages``.
        title: its name in tables and sentences.
        spec: its fields. A subclass of ``TrainingSpec`` makes it a stage that trains.
        description: of its key in the documentation of a spec.
        summary: one line for starter specs.
        inputs: stages whose artifacts it starts from when the run has them; all that train, if it does not
            train itself.
        requires: those of ``inputs`` that must be in the run, unless the spec's ``models`` have a finished one.
        data: the data that it takes.
        share: its default share of the prompts.
        sources: its fields that hold a data source of their own, or several.
        models: the fields of the spec's ``models`` that affect its result.
        makes: a base model, a policy (a model to chat with), a reward model, or a report on the other models.
        average: name of the moving average that it exports as a second model if its field ``ema`` is true.
        progress: metrics for progress lines and curves, the most important first; empty if every step measures
            something else.
        ranking: metrics that compare runs; the first one available decides.
        lower_is_better: metrics for which lower values are better.
        held_out: metrics of its evaluations on held-out data by which ``keep_best`` may choose; empty if it makes none.
        scores: metrics on the reward model's scale: not comparable across different reward models.
        result: the summary of a finished stage, with metrics of its manifest in braces.
        plots: its charts in the report.
    """

    name: str
    title: str
    spec: type[StageSpec]
    description: str
    summary: str = ""
    inputs: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    data: Data = Data.ANSWERS
    share: float = 4
    sources: tuple[str, ...] = ()
    models: tuple[str, ...] = ("actor",)
    makes: Literal["base model", "policy", "reward model", "report"] = "policy"
    average: str | None = None
    progress: tuple[str, ...] = ("loss",)
    ranking: tuple[str, ...] = ("loss",)
    lower_is_better: frozenset[str] = frozenset({"loss", "perplexity", "kl"})
    held_out: tuple[str, ...] = ()
    scores: frozenset[str] = frozenset()
    result: str = "loss {loss}"
    plots: tuple[Plot, ...] = field(default=(Plot("loss", "nats per token", {"loss": "loss"}), *TRAINING), repr=False)

    @property
    def trains(self) -> bool:
        """Whether it trains a model."""
        return issubclass(self.spec, TrainingSpec)

    @property
    def unit(self) -> str:
        """What progress lines call one of its steps."""
        return "step" if self.trains else "model"

    def shown(self, values: Iterable[str]) -> list[str]:
        """Those of a step's metrics that progress lines show."""
        return [name for name in self.progress if name in values] if self.progress else list(values)

    @property
    def makes_policy(self) -> bool:
        return self.makes == "policy"

    @property
    def makes_actor(self) -> bool:
        """Whether it makes a language model for later stages to start from."""
        return self.makes in ("base model", "policy")
