"""A toy rollout backend, reward and advantage estimator take part in PPO through the seams alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout
from tests.train import tiny
from tests.train.ppo_trainers import PROMPTS, RESPONSES, Steps, trainer_of


@dataclass
class Canned:
    """A ``RolloutBackend`` that has its responses ready."""

    synced: list[Any] = field(default_factory=list)

    def sync_weights(self, model: Any) -> None:
        self.synced.append(model)

    def generate(self, request: GenerationRequest) -> Rollout:
        assert request.eos_id == tiny.EOS
        return Rollout.of(request.prompts, [RESPONSES[PROMPTS.index(list(p))] for p in request.prompts])


class Lengths:
    """A ``RewardSource`` that pays for a response as long as its reference; without one, no score."""

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        wanted = columns["tokens"]
        return [None if n is None else float(len(r) == n) for r, n in zip(responses, wanted, strict=True)]


def reinforce(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """An ``AdvantageEstimator``: each token's advantage is the response's reward minus the mean."""
    totals = (rewards * mask).sum(dim=1, keepdim=True)
    return (totals - totals.mean()) * mask, totals * mask


def test_ppo_learns_through_the_seams_alone(steps: Callable[[float], Steps]) -> None:
    steps(1e-3)
    trainer = trainer_of(kl_coef=0.0, minibatches=2, whiten_advantages=False)
    backend = Canned()
    trainer.backend, trainer.rewards, trainer.estimate = backend, Lengths(), reinforce
    columns = {"tokens": [3, 6, 9, None, 2, 9]}  # the first two and the fifth are right

    rollout = trainer.roll_out(PROMPTS, [(row,) for row in range(len(PROMPTS))], bool)
    experience = trainer.evaluate(rollout, columns)
    stats = trainer.learn(experience)

    assert backend.synced == [trainer.models.policy]
    assert experience.scores.tolist()[:3] == [1.0, 1.0, 0.0]
    assert experience.scores[3].isnan()
    first = experience.advantages[:, 0]
    torch.testing.assert_close(first, torch.tensor([1.0, 1, 0, 0, 1, 0]) - 0.5)
    assert stats["tokens"] == sum(map(len, RESPONSES))
    after = trainer.evaluate(rollout, columns)
    gain = ((after.log_probs - experience.log_probs) * experience.advantages)[experience.mask].sum()
    assert gain > 0
