"""KTO: learn from single responses that are labeled good or bad, without a reward model or sampling.

Kahneman-Tversky optimization (arXiv 2402.01306) needs no pairs: a thumb up or down on each response is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.stages import KtoSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.kto import reference_point, value_loss
from hpc_rlhf.train.algorithms.reward import preferred
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.arrow import Rows
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.stages.learner import RESPONSES, Learner, Row, Samples
from hpc_rlhf.train.stages.referred import ReferredModels

METRICS = ("loss", "accuracy", "margin", "kl")


def run(context: StageContext) -> None:
    spec, world = context.stage_spec, context.world
    assert isinstance(spec, KtoSpec)

    # 1. Data.
    data = LabeledData.of(context)
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    if world.is_main and (warning := data.imbalance(spec)):
        print(f"hpc-rlhf: warning: stage kto: {warning}", file=sys.stderr, flush=True)

    # 2. The policy and its reference.
    models = ReferredModels(context, spec, total)

    def log_probs(model: Any, rows: list[Row], *responses: str) -> Tensor:
        """Log-probabilities of each row's responses in these columns: (columns, rows), float32, in nats."""
        pairs = [(row["prompt_ids"], row[name]) for name in responses for row in rows]
        batch, sizes = Ragged.of([p + r for p, r in pairs], world.device), [len(r) for _, r in pairs]
        flat, _ = model(batch.ids, batch.lengths, batch.tail(sizes))
        return ragged.pad(flat, sizes).sum(dim=1).view(len(responses), len(rows))

    def reference(rows: list[Row]) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of the responses, and the log-ratios of responses to other prompts."""
        with torch.no_grad():
            with models.as_reference():
                own, other = log_probs(models.ref, rows, "chosen_ids", "other_ids")
            with models.evaluating():
                return own, log_probs(models.engine, rows, "other_ids")[0] - other

    # 3. Loss.
    def measure(rows: list[Row], ref: Tensor, kl: float) -> tuple[Tensor, Tensor]:
        desirable = torch.tensor([row["label"] > 0 for row in rows], device=world.device)
        log_ratios = log_probs(models.engine, rows, "chosen_ids")[0] - ref
        losses, margins = value_loss(
            log_ratios, desirable, kl, spec.beta, spec.desirable_weight, spec.undesirable_weight
        )
        right = preferred(margins, torch.zeros_like(margins))
        return losses.sum(), torch.stack((losses.detach(), right, margins, torch.full_like(margins, kl))).sum(dim=1)

    budget = context.batch.micro * context.longest
    learner = LabelLearner(context, models.engine, data, total, RESPONSES, budget, METRICS, measure, reference)

    # 4. Train, evaluate, and compare responses with those before training.
    models.train(learner)


class Mismatched:
    """Labeled responses, each also with a response to another prompt, ``other_ids``: the nearest one before it."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row, other = self.rows[index], index - 1
        while self.rows[other]["prompt"] == row["prompt"]:
            other -= 1
            if other < index - len(self.rows):
                raise HpcRlhfError(
                    "all responses of its training data, or all held-out ones, are to the same prompt",
                    where="stage kto",
                    hint="KTO compares responses with those to other prompts; add data, or set data.held_out: 0",
                )
        return {**row, "other_ids": self.rows[other]["chosen_ids"]}


@dataclass(frozen=True)
class LabeledData:
    train: Mismatched
    held_out: Mismatched

    @classmethod
    def of(cls, context: StageContext) -> LabeledData:
        data = context.data()
        return cls(Mismatched(data.train), Mismatched(data.held_out))

    @cached_property
    def labels(self) -> list[float]:
        """Of the training rows: 1 for good responses, 0 for bad ones."""
        labels: list[float] = self.train.rows.table["label"].to_pylist()
        return labels

    def imbalance(self, spec: KtoSpec) -> str | None:
        """What to do if good and bad responses count very differently (arXiv 2402.01306, section 4.2)."""
        good = sum(self.labels)
        bad = len(self.labels) - good
        if not good or not bad:
            return f"all {len(self.labels)} responses are {'good' if good else 'bad'}; KTO learns from both kinds"
        ratio = spec.desirable_weight * good / (spec.undesirable_weight * bad)
        if 0.95 <= ratio <= 1.4:
            return None
        least, most = (share * spec.undesirable_weight * bad / good for share in (1, 4 / 3))
        return (
            f"there are {good:.0f} good and {bad:.0f} bad responses; set desirable_weight between {least:.3g} and "
            f"{most:.3g}, so that good ones count 1 to 4/3 times as much"
        )


class LabelLearner(Learner):
    """Learns from labeled responses. The reference point is one of the whole step, or of all held-out responses."""

    def length_of(self, rows: Samples) -> Callable[[int], int]:
        assert isinstance(rows, Mismatched)
        return super().length_of(rows.rows)

    def prepared(self, batches: list[tuple[list[Row], bool]]) -> list[tuple[Any, ...]]:
        parts = [(*self.prepare(rows), real) for rows, real in batches]
        own = {
            "mismatched": sum(ratios.double().sum().item() for _, ratios, real in parts if real),
            "count": float(sum(len(ratios) for _, ratios, real in parts if real)),
        }
        kl = reference_point(**self.context.world.sums(own))
        return [(ref, kl) for ref, _, _ in parts]
