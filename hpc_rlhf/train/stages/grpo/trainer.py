"""The steps of GRPO on given prompts: groups of responses, their advantages, and learning from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import GrpoSpec
from hpc_rlhf.train.algorithms import group_advantages, ppo
from hpc_rlhf.train.rewards.blend import Scores
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.experience import GroupExperience, TokenStats, evaluate_tokens, gather_moments
from hpc_rlhf.train.stages.grpo.metrics import STATS
from hpc_rlhf.train.stages.grpo.models import GrpoModels
from hpc_rlhf.train.stages.policy.minibatches import Minibatch
from hpc_rlhf.train.stages.policy.trainer import PolicyTrainer, as_tensor, padded

ADVANTAGES = {"grpo": group_advantages.grpo, "dr_grpo": group_advantages.dr_grpo, "rloo": group_advantages.rloo}


@dataclass
class GrpoTrainer(PolicyTrainer[GroupExperience]):
    """The algorithm of ``stages.grpo``; see ``PolicyTrainer``. In a rollout, the responses to a prompt follow one
    another.

    Attributes:
        position: prompts that have been sampled for, over all ranks.
    """

    spec: GrpoSpec
    models: GrpoModels

    kind: ClassVar[type[GroupExperience]] = GroupExperience
    stats: ClassVar[tuple[str, ...]] = STATS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.position = 0

    @property
    def passes(self) -> int:
        return self.spec.num_iterations

    @property
    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def groups(self, rollout: Rollout) -> Tensor:
        """The number of each response's prompt: (batch,), int64."""
        return torch.arange(len(rollout), device=self.world.device) // self.spec.group_size

    # Evaluation

    def evaluate_scored(self, rollout: Rollout, scored: Scores, learned_next: bool = False) -> GroupExperience:
        """The experience of a scored rollout: log-probabilities and advantages. Collective.

        Uses the same micro-batches as ``learn``, so that before the first update a token's log-probability is the same
        to the last bit.

        Args:
            learned_next: the next call is ``learn``. It may then fill in the actor's log-probabilities and entropies,
                which are NaN here.
        """
        spec, models, device = self.spec, self.models, self.world.device
        models.actor.eval()
        plan = [rows for minibatch in self.micro_batches(rollout) for rows in minibatch]
        ref, actor = models.ref, _unknown if learned_next and spec.updates_once else self._keeping(rollout, plan)
        if ref is None:
            actor = partial(self._checked, "experience", actor)
        else:
            ref = partial(self._checked, "experience", ref)
        stats = evaluate_tokens(rollout, plan, actor, None, ref, spec.temperature, device)
        models.actor.train()
        scores = as_tensor(scored.total, device)
        shaped = self._shaped(rollout, stats, scores)
        takes_part = ~scores.isnan()
        if spec.overlong == "mask":
            takes_part &= rollout.ended(self.eos_id, device)
        stats = replace(stats, mask=stats.mask & takes_part.unsqueeze(1))
        weights = self._weights(rollout) * takes_part
        advantages = self._advantages(rollout, stats, shaped) * weights.unsqueeze(1)
        experience = GroupExperience(
            **vars(stats), rollout=rollout, scores=scores, advantages=advantages, weights=weights
        )  # fmt: skip
        return self.corrected(experience)

    def _shaped(self, rollout: Rollout, stats: TokenStats, scores: Tensor) -> Tensor:
        """Scores minus the penalties on whole responses: (batch,), NaN where there is no score."""
        spec = self.spec
        if spec.overlong == "penalty":
            longest = self.sizes.response
            margin = spec.overlong_margin or max(1, longest // 5)
            lengths = torch.tensor(rollout.response_lengths, device=scores.device)
            scores = scores + group_advantages.overlong_penalty(lengths, longest, margin)
        if spec.kl_in == "reward" and spec.advantage != "reinforce++":
            k1 = (stats.log_probs - stats.ref_log_probs).where(stats.mask, 0.0).sum(dim=1)
            scores = scores - spec.kl_coef * k1
        return scores

    def _advantages(self, rollout: Rollout, stats: TokenStats, scores: Tensor) -> Tensor:
        """(batch, response), 0 outside the mask."""
        spec = self.spec
        if spec.advantage != "reinforce++":
            return ADVANTAGES[spec.advantage](scores, self.groups(rollout)).unsqueeze(1) * stats.mask
        kl_coef = spec.kl_coef if spec.kl_in == "reward" else 0.0
        known = scores.nan_to_num(0.0)
        rewards = ppo.kl_shaped_rewards(stats.log_probs, stats.ref_log_probs, known, stats.mask, kl_coef)
        returns = group_advantages.returns_to_go(rewards, stats.mask)
        return group_advantages.batch_normalized(returns, stats.mask, partial(gather_moments, self.world))

    def _weights(self, rollout: Rollout) -> Tensor:
        """The weight of each response's loss, by ``loss_normalization``: (batch,)."""
        lengths = torch.tensor(rollout.response_lengths, dtype=torch.float32, device=self.world.device)
        kind = self.spec.loss_normalization
        if kind == "sequence":
            return 1 / lengths
        return torch.full_like(lengths, 1.0 if kind == "token" else 1 / self.sizes.response)

    # Learning

    def _actor(self, experience: GroupExperience, rows: list[int], with_entropies: bool = False) -> Any:
        output = super()._actor(experience, rows, self.spec.updates_once)
        if self.spec.updates_once and rows:
            log_probs, entropies = (part.detach() for part in output)
            columns = experience.log_probs, experience.ref_log_probs, experience.entropies
            for column, flat in zip(columns, (log_probs, log_probs, entropies), strict=True):
                numbers, (known,) = padded(experience, rows, flat, column)
                column[rows, : numbers.shape[1]] = known.where(~known.isnan(), numbers)
        return output

    def denominator(self, minibatch: Minibatch) -> float:
        return minibatch.all_tokens if self.spec.mean_over == "tokens" else minibatch.all_responses

    def count_learned(self, minibatch: Minibatch, stats: dict[str, Tensor]) -> None:
        super().count_learned(minibatch, stats)
        stats["responses"] += minibatch.own_responses

    def penalty(self, experience: GroupExperience, rows: list[int], log_probs: Tensor) -> Tensor | float:
        """The KL penalty of GRPO (arXiv 2402.03300, equation 4): the k3 estimator, with the weights of the loss."""
        if self.spec.kl_in == "reward" or not self.spec.kl_coef:
            return 0.0
        width = log_probs.shape[1]
        mask, ref = (column[rows, :width] for column in (experience.mask, experience.ref_log_probs))
        return self.spec.kl_coef * (experience.weights[rows] * ppo.k3_kl(log_probs, ref, mask)).sum()


def _unknown(ids: Tensor, lengths: tuple[int, ...], predicted: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What stands for the actor's outputs until learning fills them in."""
    nothing = torch.full(predicted.shape, torch.nan, device=ids.device)
    return nothing, nothing
