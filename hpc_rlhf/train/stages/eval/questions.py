"""What an evaluation asks a model, distributed over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import EvalSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.ragged import Ragged, balance_ranks, plan_step
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, RolloutBackend, Sampling


class Questions:
    """Results are the same for any number of ranks, and known to every rank. All methods are collective.

    The attempt may stop between pieces of work.
    """

    def __init__(self, context: StageContext, spec: EvalSpec) -> None:
        self.context = context
        self.spec = spec
        self.budget = context.batch.micro * context.longest

    def responses(self, backend: RolloutBackend, prompts: list[list[int]]) -> list[list[int]]:
        """A model's responses to prompts; each has its own random numbers, the same for all models."""
        context, spec = self.context, self.spec
        if not prompts:
            return []
        own = self._own_rows([len(prompt) for prompt in prompts])
        request = GenerationRequest(
            [prompts[i] for i in own],
            context.spec.data.max_answer_tokens,
            context.tokenizer.eos_token_id,
            Sampling(spec.temperature or 1.0, spec.top_p, spec.top_k, greedy=spec.temperature == 0),
            [(context.spec.seed, "eval", i) for i in own],
            should_stop=context.stop.should_stop,
        )
        with context.stop.cancellable():
            rollout = backend.generate(request)
        return self._combine(dict(zip(own, rollout.responses, strict=True)))

    def scores(self, rewards: RewardSource, rollout: Rollout) -> list[float]:
        """The score of each prompt with its response."""
        own = self._own_rows(rollout.lengths)
        prompts, responses = [rollout.prompts[i] for i in own], [rollout.responses[i] for i in own]
        scores = rewards.score(prompts, responses, {})
        return self._combine(dict(zip(own, scores, strict=True)))

    def log_probs(self, engine: Any, rollout: Rollout) -> list[list[float]]:
        """Log-probabilities of each response's tokens, at the temperature that responses are drawn at."""
        temperature = self.spec.temperature or 1.0

        def measure(batch: Ragged, response: Tensor, sizes: list[int]) -> list[list[float]]:
            flat, _ = engine(batch.ids, batch.lengths, response, temperature)
            return [[round(number, 6) for number in part.tolist()] for part in flat.split(sizes)]

        return self._measure(rollout, measure)

    def likelihoods(self, engine: Any, rollout: Rollout) -> list[float]:
        """Log-probability of each whole response, at temperature 1."""

        def measure(batch: Ragged, response: Tensor, sizes: list[int]) -> list[float]:
            flat, _ = engine(batch.ids, batch.lengths, response)
            return [part.sum().item() for part in flat.double().split(sizes)]

        return self._measure(rollout, measure)

    @torch.no_grad()
    def _measure(self, rollout: Rollout, measure: Callable[[Ragged, Tensor, list[int]], list[Any]]) -> list[Any]:
        """Measure each sequence, a micro-batch at a time.

        Args:
            measure: called with a batch, the indices of its response tokens, and their number in each sequence.
        """
        if not len(rollout):
            return []
        world = self.context.world
        results: dict[int, Any] = {}
        for rows in plan_step(rollout.lengths, world.size, self.budget)[world.rank]:
            self.context.stop.check("evaluation")
            batch, response = rollout.batch(rows or [0], world.device)
            numbers = measure(batch, response, [rollout.response_lengths[row] for row in rows or [0]])
            if rows:  # an empty micro-batch only keeps ranks in sync
                results.update(zip(rows, numbers, strict=True))
        return self._combine(results)

    def _own_rows(self, lengths: tuple[int, ...] | list[int]) -> list[int]:
        world = self.context.world
        return balance_ranks(lengths, world.size)[world.rank]

    def _combine(self, own: dict[int, Any]) -> list[Any]:
        """All ranks' results, by row."""
        results = {row: one for part in self.context.world.gather(own) for row, one in part.items()}
        return [results[row] for row in range(len(results))]
