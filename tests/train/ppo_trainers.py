"""PPO's steps on tiny models in this process, with plain optimizers instead of DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.engine import StepResult
from hpc_rlhf.train.models.language_model import LanguageModel, RewardModel
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.stages.policy.minibatches import Sizes
from hpc_rlhf.train.stages.ppo.trainer import PpoTrainer
from tests.train import tiny

PROMPTS = [[5, 9, 11, 30, 7], [8], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 4], [6, 6], [90, 12, 13]]
RESPONSES = [
    [10, 20, tiny.EOS], [31, 32, 33, 34, 35, 36], [tiny.EOS], [50, 51, 52, 53, 54, tiny.EOS],
    [60, tiny.EOS], [61, 62, 63, 64],
]  # fmt: skip
ROLLOUT = Rollout.of(PROMPTS, RESPONSES)
TOKENS = sum(map(len, RESPONSES))


class Alone(SimpleNamespace):
    """A world of one rank, with the numbers of further ranks given by a test.

    Attributes:
        others: added to every number summed over the ranks, by its name.
        parts: the other ranks' values in a gather.
    """

    def __init__(self, others: dict[str, float] | None = None, parts: list[Any] | None = None) -> None:
        super().__init__(device=torch.device("cpu"), rank=0, data_rank=0, others=others or {}, parts=parts or [])

    def sums(self, numbers: dict[str, float]) -> dict[str, float]:
        return {name: value + self.others.get(name, 0.0) for name, value in numbers.items()}

    def gather_data(self, thing: Any) -> list[Any]:
        return [thing, *self.parts]

    def max(self, number: int) -> int:
        return number


def language(seed: int = 0) -> LanguageModel:
    model = tiny.causal("llama", seed)
    packed_attention.enable(model)
    return LanguageModel(model)


def rewarding(seed: int = 1) -> RewardModel:
    model = tiny.classifier("llama", seed)
    packed_attention.enable(model)
    return RewardModel(model)


class LeftOut:
    """Counts the steps that a learning-rate schedule leaves out."""

    def __init__(self) -> None:
        self.steps = 0

    def skip(self, steps: int) -> None:
        self.steps += steps


def trainer_of(world: Any = None, budget: int = 1000, ref_seed: int = 0, **fields: Any) -> PpoTrainer:
    world = world or Alone()
    models = SimpleNamespace(actor=language(), critic=rewarding(), ref=language(ref_seed), policy=None, ema=None)
    for model in (models.actor, models.critic):
        model.lr_scheduler = LeftOut()
    backend, rewards = SimpleNamespace(), ModelReward(rewarding().eval(), world, budget)
    sizes = Sizes(budget=budget, response=8, loss_factor=1.0)
    return PpoTrainer(PpoSpec(**fields), models, backend, rewards, tiny.EOS, sizes, world)  # type: ignore[arg-type]


class Steps:
    """Optimizer steps by plain Adam instead of DeepSpeed.

    Attributes:
        skip: numbers of steps that are skipped as DeepSpeed skips a step with an infinite gradient.
    """

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.count = 0
        self.skip: set[int] = set()
        self.gradients: list[Tensor] = []
        self._adams: dict[int, torch.optim.Adam] = {}

    def __call__(self, model: Any, losses: list[Callable[[], Tensor]]) -> StepResult:
        adam = self._adams.setdefault(id(model), torch.optim.Adam(model.parameters(), self.lr, (0.9, 0.95)))
        adam.zero_grad()
        for loss in losses:
            loss().backward()
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        applied = self.count not in self.skip
        if applied:
            adam.step()
        self.count += 1
        return StepResult(float(self.gradients[-1].norm()) if applied else math.inf, applied)
