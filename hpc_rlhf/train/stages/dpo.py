"""DPO: learn from pairs of responses which one people prefer, without a reward model or sampling.

Direct preference optimization (arXiv 2305.18290) replaces the reward model and PPO.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import DpoSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.dpo import preference_loss
from hpc_rlhf.train.algorithms.reward import preferred
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.stages.learner import PAIRS, Learner, Row, pack_pairs
from hpc_rlhf.train.stages.referred import ReferredModels

METRICS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


def run(context: StageContext) -> None:
    spec, world = context.stage_spec, context.world
    assert isinstance(spec, DpoSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = 2 * context.batch.micro * context.longest

    # 2. The policy and its reference.
    models = ReferredModels(context, spec, total)

    def log_probs(model: Any, rows: list[Row]) -> Tensor:
        """Log-probabilities of whole responses: (2, pairs), chosen and rejected, float32, in nats."""
        batch, sizes = pack_pairs(rows, world.device)
        flat, _ = model(batch.ids, batch.lengths, batch.tail(sizes))
        return ragged.pad(flat, sizes).sum(dim=1).view(2, len(rows))

    def reference(rows: list[Row]) -> tuple[Tensor]:
        with torch.no_grad(), models.as_reference():
            return (log_probs(models.ref, rows),)

    # 3. Loss.
    def measure(rows: list[Row], ref: Tensor) -> tuple[Tensor, Tensor]:
        policy = log_probs(models.engine, rows)
        losses, chosen, rejected = preference_loss(
            policy[0], policy[1], ref[0], ref[1], spec.beta, spec.label_smoothing
        )
        sums = (losses.detach(), preferred(chosen, rejected), chosen - rejected, chosen, rejected)
        return losses.sum(), torch.stack(sums).sum(dim=1)

    learner = Learner(context, models.engine, data, total, PAIRS, budget, METRICS, measure, reference)

    # 4. Train, evaluate, and compare responses with those before training.
    models.train(learner)
