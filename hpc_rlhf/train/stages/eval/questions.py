"""What an evaluation asks a model, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.sizes import ROWS
from hpc_rlhf.spec.stages import EvalSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.ragged import Ragged, deal, plan_step
from hpc_rlhf.train.rollout.experience import Rollout
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.rollout.in_process.sampling import Sampling


class Questions:
    """All answers are the same on any number of ranks, and known to every rank. All methods are collective.

    The attempt may end between pieces of work.
    """

    def __init__(self, context: StageContext, spec: EvalSpec) -> None:
        self.context = context
        self.spec = spec

    def answers(self, rollouts: RolloutEngine, prompts: list[list[int]]) -> list[list[int]]:
        """A model's answers to prompts; each is drawn with random numbers of its own, the same for all models."""
        context, spec, tokenizer = self.context, self.spec, self.context.tokenizer
        if not prompts:
            return []
        share = deal([len(prompt) for prompt in prompts], context.world.size)[context.world.rank]
        sampling = Sampling(spec.temperature or 1.0, spec.top_p, spec.top_k, greedy=spec.temperature == 0)
        made: list[list[int]] = []
        with context.stop.cancellable():
            made = rollouts.generate(
                [prompts[i] for i in share], [(context.spec.seed, "eval", i) for i in share],
                context.spec.data.max_answer_tokens, sampling,
                tokenizer.eos_token_id, ROWS,
                context.stop.should_stop,
            )  # fmt: skip
        return self._together(dict(zip(share, made, strict=True)))

    def log_probs(self, engine: Any, rollout: Rollout) -> list[list[float]]:
        """Log-probabilities of each answer's tokens, at the temperature that answers are drawn at."""
        temperature = self.spec.temperature or 1.0

        def of(batch: Ragged, answers: Tensor, sizes: list[int]) -> list[list[float]]:
            flat, _ = engine(batch.ids, batch.lengths, answers, temperature)
            return [[round(number, 6) for number in part.tolist()] for part in flat.split(sizes)]

        return self._each(rollout, of)

    def likelihoods(self, engine: Any, rollout: Rollout) -> list[float]:
        """Log-probability of each whole answer, by the model as it is."""

        def of(batch: Ragged, answers: Tensor, sizes: list[int]) -> list[float]:
            flat, _ = engine(batch.ids, batch.lengths, answers)
            return [part.sum().item() for part in flat.double().split(sizes)]

        return self._each(rollout, of)

    def scores(self, engine: Any, rollout: Rollout) -> list[float]:
        """The reward model's score of each prompt with its answer."""

        def of(batch: Ragged, answers: Tensor, sizes: list[int]) -> list[float]:
            found: list[float] = engine(batch.ids, batch.lengths)[batch.tail([1] * len(sizes))].tolist()
            return found

        return self._each(rollout, of)

    @torch.no_grad()
    def _each(self, rollout: Rollout, of: Callable[[Ragged, Tensor, list[int]], list[Any]]) -> list[Any]:
        """Something of each sequence, a micro-batch at a time.

        Args:
            of: gives it for a batch, the indices of its answer tokens, and how many each sequence has.
        """
        if not len(rollout):
            return []
        world = self.context.world
        found: dict[int, Any] = {}
        plan = plan_step(rollout.lengths, world.size, self.context.batch.micro * self.context.longest)
        for rows in plan[world.rank]:
            self.context.stop.check("evaluation")
            batch, answers = rollout.batch(rows or [0], world.device)
            made = of(batch, answers, [len(rollout.answers[row]) for row in rows or [0]])
            if rows:  # else only to keep step with the others
                found.update(zip(rows, made, strict=True))
        return self._together(found)

    def _together(self, found: dict[int, Any]) -> list[Any]:
        """What the ranks found, in order of the numbers."""
        whole = {number: one for part in self.context.world.gather(found) for number, one in part.items()}
        return [whole[number] for number in range(len(whole))]
