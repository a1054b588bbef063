"""Rewards by a trained reward model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hpc_rlhf.train.ragged import Ragged, pack_micro_batches, split_to_count
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.runtime.world import World


class ModelReward:
    """The reward model's output at each sequence's last token.

    Args:
        engine: a frozen ``RewardModel``.
        budget: tokens of a micro-batch.
        check: called before each micro-batch; it may raise. Collective.
    """

    def __init__(self, engine: Any, world: World, budget: int, check: Callable[[], object] = lambda: None) -> None:
        self.engine = engine
        self.world = world
        self.budget = budget
        self.check = check

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        rollout = Rollout.of(prompts, responses, self.world.device)
        bins = pack_micro_batches(rollout.lengths, self.budget)
        scores: list[float | None] = [None] * len(rollout)
        for rows in split_to_count(bins, self.world.max(len(bins))):
            self.check()
            # An empty micro-batch only keeps ranks in sync.
            batch = rollout.sequences.select(rows) if rows else Ragged.of([[0]], self.world.device)
            values = self.engine(batch.ids, batch.lengths)[batch.tail([1] * len(batch))].float()
            for row, value in zip(rows, values.tolist(), strict=False):
                scores[row] = value
        return scores
