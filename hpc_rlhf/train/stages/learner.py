"""What SFT, the reward model, DPO and KTO have in common: how a model learns from rows of data. PPO's pretraining
mixture uses the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_rlhf.spec.sizes import EVALUATED_ROWS
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.arrow import Rows
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.data.tokenized import token_lengths
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.parallel.deepspeed_internals import trained_model
from hpc_rlhf.train.ragged import Ragged, plan_step
from hpc_rlhf.train.stages.held_out import HeldOut

Row = dict[str, Any]

# The token ids of a row that go through the model, for responses and for pairs of them.
RESPONSES = ("prompt_ids", "chosen_ids")
PAIRS = (*RESPONSES, "prompt_ids", "rejected_ids")


def evaluated_rows(count: int, seed: int, most: int = EVALUATED_ROWS) -> list[int]:
    """Which of ``count`` held-out rows are evaluated, in order: at most ``most``, drawn at random from all sources."""
    return sorted(sample_at(place, count, seed, "held out") for place in range(min(count, most)))


def step_indices(context: StageContext, purpose: str, count: int, step: int) -> list[int]:
    """Which of ``count`` rows a step uses over all ranks, the same for any number of ranks.

    Args:
        purpose: names the stream of samples, so that two streams differ.
    """
    seed, size = context.spec.seed, context.batch.global_
    return [sample_at(place, count, seed, purpose) for place in range(step * size, (step + 1) * size)]


def micro_batches(
    context: StageContext, length_of: Callable[[int], int], indices: list[int], budget: int
) -> list[tuple[list[int], bool]]:
    """This rank's micro-batches of some rows, each with True if it is real.

    Every rank gets the same number, because passes are collective under ZeRO-3; a micro-batch that is not real only
    keeps ranks in sync.

    Args:
        length_of: tokens of a row.
        budget: tokens of a micro-batch, which holds as many whole sequences as fit.
    """
    world = context.world
    plan = plan_step([int(length_of(i)) for i in indices], world.dims.data, budget)[world.data_rank]
    return [([indices[i] for i in chosen or [0]], bool(chosen)) for chosen in plan]


def pack_pairs(rows: list[Row], device: torch.device) -> tuple[Ragged, list[int]]:
    """The chosen and then the rejected responses, each after its prompt, and the tokens of each response."""
    responses = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    prompts = [row["prompt_ids"] for row in rows] * 2
    sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
    return Ragged.of(sequences, device), [len(response) for response in responses]


class Samples(Protocol):
    """Rows by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class LearnedData(Protocol):
    """What a model learns from, and what it is evaluated on."""

    @property
    def train(self) -> Samples: ...

    @property
    def held_out(self) -> Samples: ...


@dataclass
class Learner:
    """An engine that learns from a stage's rows, and is evaluated on the held-out ones.

    Attributes:
        total: optimizer steps of the stage.
        columns: token ids of a row that go through the model.
        budget: tokens of a micro-batch.
        names: of the metrics.
        measure: given rows and what ``prepare`` made of them, the sum of their losses and, without gradient, the sums
            of their metrics: (metrics,).
        prepare: called for all micro-batches of a step before any is measured.
        learned_tokens: of a row, if losses and metrics are means over tokens; otherwise they are means over rows.
        derived: further evaluation metrics, computed from the means.
    """

    context: StageContext
    engine: Any
    data: LearnedData
    total: int
    columns: tuple[str, ...]
    budget: int
    names: tuple[str, ...]
    measure: Callable[..., tuple[Tensor, Tensor]]
    prepare: Callable[[list[Row]], tuple[Any, ...]] = lambda rows: ()
    learned_tokens: Callable[[Row], int] | None = None
    derived: Callable[[dict[str, float]], dict[str, float]] = lambda means: {}

    def __post_init__(self) -> None:
        self._length_of_train = self.length_of(self.data.train)
        samples = len(self.data.held_out)
        self.held_out = HeldOut(self.context, trained_model(self.engine), self.total, samples, self.evaluate)

    def load(self, checkpoint: Checkpoint) -> None:
        engines.load(self.engine, checkpoint.folder / "engine", self.context.world)
        self.held_out.load(checkpoint.folder)

    def save(self, snapshot: Snapshot) -> None:
        engines.save(self.engine, snapshot, "engine", self.context.world)
        self.held_out.save(snapshot)

    def length_of(self, rows: Samples) -> Callable[[int], int]:
        """The tokens of each of some rows that go through the model."""
        assert isinstance(rows, Rows)
        lengths: Callable[[int], int] = token_lengths(rows, *self.columns).__getitem__
        return lengths

    def indices(self, step: int) -> list[int]:
        """Which rows a step uses over all ranks."""
        return step_indices(self.context, self.context.stage, len(self.data.train), step)

    def train(self, first: int, state: dict[str, Any]) -> None:
        """The optimizer steps from ``first`` on, with a safe point before and after each. Collective."""
        context = self.context
        for step in range(first, self.total):
            context.checkpoints.safe_point(step, self.save, state)
            self.held_out.after(step)
            context.reseed(step)
            values = self.step(self.indices(step))
            context.metrics.log(step + 1, self.total, "train", values)
        context.checkpoints.safe_point(self.total, self.save, state)

    def batches(
        self, rows: Samples, length_of: Callable[[int], int], indices: list[int]
    ) -> list[tuple[list[Row], bool]]:
        """This rank's micro-batches; see ``micro_batches``."""
        planned = micro_batches(self.context, length_of, indices, self.budget)
        return [([rows[i] for i in chosen], real) for chosen, real in planned]

    def step(self, indices: list[int]) -> dict[str, float]:
        """An optimizer step on some rows; returns its metrics. Collective."""
        batches = self.batches(self.data.train, self._length_of_train, indices)
        prepared = self.prepared(batches)
        count, rate = self._count(indices, batches, self.learned_tokens), engines.learning_rate(self.engine)
        measured: list[Tensor] = []

        def scaled_loss(rows: list[Row], real: bool, inputs: tuple[Any, ...]) -> Tensor:
            if self.context.world.dims.pipeline > 1:  # its stages are at different micro-batches
                self.context.stop.should_stop()
            else:
                self.context.stop.check("micro-batch")  # a stop discards the gradients so far
            loss, sums = self.measure(rows, *inputs)
            measured.append(sums * real)
            return loss * (real * self.context.loss_factor / count)

        losses = [partial(scaled_loss, *batch, inputs) for batch, inputs in zip(batches, prepared, strict=True)]
        result = engines.optimizer_step(self.engine, losses)
        tokens = {"tokens": count} if self.learned_tokens else {}
        values = {**self.means(measured, count), "lr": rate, **tokens, **result.metrics}
        return {**values, **engines.traffic([self.engine])}

    def prepared(self, batches: list[tuple[list[Row], bool]]) -> list[tuple[Any, ...]]:
        """What ``measure`` gets for each of this rank's micro-batches besides its rows. Collective."""
        return [self.prepare(rows) for rows, _ in batches]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The metrics on the held-out rows. Collective."""
        means = self.held_out_means(self.measure, self.learned_tokens)
        return {**means, **self.derived(means)}

    @torch.no_grad()
    def held_out_means(
        self, measure: Callable[..., tuple[Tensor, Tensor]], learned_tokens: Callable[[Row], int] | None
    ) -> dict[str, float]:
        """The means of what is measured on the held-out rows; see ``Learner``. Collective."""
        rows = self.data.held_out
        indices = evaluated_rows(len(rows), self.context.spec.seed)
        batches = self.batches(rows, self.length_of(rows), indices)
        inputs = iter(self.prepared(batches))
        measured = self.measured(batches, lambda chosen: measure(chosen, *next(inputs))[1])
        return self.means(measured, self._count(indices, batches, learned_tokens))

    def measured(self, batches: list[tuple[list[Row], bool]], measure: Callable[[list[Row]], Tensor]) -> list[Tensor]:
        """What is measured on each of this rank's micro-batches, without dropout; 0 for those that are not real."""
        self.engine.eval()
        sums = []
        for chosen, real in batches:
            self.context.stop.check("evaluation")
            sums.append(measure(chosen) * real)
        self.engine.train()
        return sums

    def _count(
        self, indices: list[int], batches: list[tuple[list[Row], bool]], learned_tokens: Callable[[Row], int] | None
    ) -> float:
        """The number of rows, or the number of tokens learned, in all ranks' micro-batches. Collective."""
        if learned_tokens is None:
            return float(len(indices))
        own = sum(learned_tokens(row) for rows, real in batches if real for row in rows)
        return self.context.world.sums({"tokens": float(own)})["tokens"]

    def means(self, measured: list[Tensor], count: float) -> dict[str, float]:
        """The mean of each metric, from all ranks' sums. Collective."""
        own = dict(zip(self.names, torch.stack(measured).double().sum(dim=0).tolist(), strict=True))
        return {name: value / count for name, value in self.context.world.sums(own).items()}
