"""The steps of PPO on given prompts: responses, their evaluation, and learning from them."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.algorithms.advantages import AdvantageEstimator, Gae
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.rewards.blend import Blend, Scores
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.experience import (
    Experience,
    RewardShaping,
    evaluate_tokens,
    gather_moments,
    make_experience,
    scaled_values,
    whiten,
)
from hpc_rlhf.train.stages.policy.trainer import ACTOR, PolicyTrainer, as_tensor, padded
from hpc_rlhf.train.stages.ppo.metrics import STATS
from hpc_rlhf.train.stages.ppo.models import PpoModels


@dataclass
class PpoTrainer(PolicyTrainer[Experience]):
    """The algorithm of ``stages.ppo``; see ``PolicyTrainer``.

    Attributes:
        kl_coef: weight of the KL penalty in the next rollout's rewards.
        estimate: turns rewards into advantages.
    """

    spec: PpoSpec
    models: PpoModels

    kind: ClassVar[type[Experience]] = Experience
    networks: ClassVar[tuple[str, ...]] = (ACTOR, "critic")
    stats: ClassVar[tuple[str, ...]] = STATS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kl_coef = self.spec.kl_coef
        self.estimate: AdvantageEstimator = Gae(self.spec.gamma, self.spec.lam)
        self._scores = Moments()
        # The critic starts from the reward model, so its outputs are on the scale of that model's scores only.
        self._scales_values = self.spec.normalize_scores and _is_reward_model(self.rewards)

    @property
    def passes(self) -> int:
        return self.spec.ppo_epochs

    @property
    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "scores": astuple(self._scores), "scales_values": self._scales_values}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.kl_coef, self._scores = state["kl_coef"], Moments(*state["scores"])
        # A critic trained by an earlier version has learned normalized scores.
        self._scales_values = state.get("scales_values", False)

    # Evaluation

    def evaluate_scored(self, rollout: Rollout, scored: Scores) -> Experience:
        """The experience of a scored rollout: log-probabilities, values and advantages. Collective.

        Uses the same micro-batches as ``learn``, so that before the first update a token's log-probability
        is the same to the last bit.
        """
        spec, models = self.spec, self.models
        models.actor.eval()
        models.critic.eval()
        device = self.world.device
        scores, failed = as_tensor(scored.total, device), torch.tensor(scored.failed, device=device)
        if spec.normalize_scores:
            own = Moments.of(scores[~scores.isnan()])
            self._scores = Moments.merge([self._scores, *gather_moments(self.world, own)])
        plan = [rows for minibatch in self.micro_batches(rollout) for rows in minibatch]
        ref = partial(self._checked, "experience", models.ref)
        actor = self._keeping(rollout, plan)
        stats = evaluate_tokens(rollout, plan, actor, models.critic, ref, spec.temperature, device)
        stats = replace(stats, mask=stats.mask & ~failed.unsqueeze(1))
        shaping = RewardShaping(
            self.kl_coef, spec.score_clip, spec.missing_eos_penalty,
            self._scores.standardize if spec.normalize_scores else None,
            partial(gather_moments, self.world) if spec.whiten_rewards else None,
        )  # fmt: skip
        experience = make_experience(rollout, stats, scores, shaping, self.estimate, self.eos_id, self._value_scale())
        models.actor.train()
        models.critic.train()
        if spec.kl_target is not None:
            self._adapt_kl_coef(experience, spec.kl_target)
        if spec.whiten_advantages:
            experience = whiten(experience, partial(gather_moments, self.world))
        return self.corrected(experience)

    def _value_scale(self) -> tuple[float, float]:
        """What the critic's outputs are taken relative to: its offset and its unit.

        The critic starts from the reward model, so it predicts scores as that model gives them. With normalized scores
        its outputs are normalized by the same running moments: what it has learned about the scores stays valid however
        the moments move (Pop-Art, arXiv 1602.07714), and it never has to learn the change of scale first.
        """
        return (self._scores.mean, self._scores.std or 1.0) if self._scales_values else (0.0, 1.0)

    def _adapt_kl_coef(self, experience: Experience, target: float) -> None:
        kl = ppo.k3_kl(experience.log_probs, experience.ref_log_probs, experience.mask).sum().item()
        total = self.world.sums({"kl": kl, "responses": float(experience.mask.any(dim=1).sum())})
        if not total["responses"]:
            return
        self.kl_coef = ppo.adapted_kl_coef(
            self.kl_coef, total["kl"] / total["responses"], target, self.spec.kl_horizon, total["responses"]
        )

    # Learning

    def _critic_loss(self, experience: Experience, rows: list[int], scale: float, stats: dict[str, Tensor]) -> Tensor:
        """A micro-batch's value loss, times the scale; adds to the stats."""
        batch, response = experience.rollout.batch(rows or [0], self.world.device)
        flat = self.models.critic(batch.ids, batch.lengths)[response - 1].float()
        flat = scaled_values(flat, experience.value_scale)
        values, (old, returns, mask) = padded(
            experience, rows, flat, experience.values, experience.returns, experience.mask
        )
        loss, clipped = ppo.value_loss_sum(values, old, returns, mask, self.spec.cliprange_value)
        real = bool(rows)
        for name, value in {"critic_loss": loss, "value_clipped": clipped}.items():
            stats[name] += value.detach() * real
        return loss * (scale * real)


def _is_reward_model(rewards: RewardSource) -> bool:
    """Whether the scores are those of the reward model that the critic starts from."""
    if isinstance(rewards, Blend):
        weighted = [(part.source, part.weight) for part in rewards.parts if part.weight]
        return [weight for source, weight in weighted if isinstance(source, ModelReward)] == [1.0] * len(weighted)
    return isinstance(rewards, ModelReward)
