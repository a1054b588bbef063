"""Experience: a rollout with everything that PPO or GRPO learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.algorithms.advantages import AdvantageEstimator
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.runtime.world import World

# Gathers the moments of each rank's samples.
GatherMoments = Callable[[Moments], list[Moments]]


@dataclass(frozen=True)
class TokenStats:
    """The models' outputs for response tokens: (batch, response), float32, 0 after a response's end.

    Attributes:
        mask: (batch, response), bool; True on the real tokens, EOS included, of responses that take part in training.
        log_probs, ref_log_probs: of the sampled tokens, under the actor that sampled them and under the reference;
            without a reference, both are the actor's.
        values: the critic's value of the state before each token; 0 without a critic.
        entropies: of the distributions that the tokens were drawn from, in nats.
    """

    mask: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class Evaluated(TokenStats):
    """A rollout that an actor learns from.

    Attributes:
        scores: (batch,), float32, the reward source's; NaN where it gave none.
        advantages: (batch, response), float32, 0 outside the mask.
    """

    rollout: Rollout
    scores: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Experience(Evaluated):
    """A rollout as PPO learns from it.

    Attributes:
        score_clipped: (batch,), float32; 1 where ``score_clip`` changed the score, 0 where not, NaN without a score.
        value_scale: (2,), float32; ``values`` are the critic's outputs minus the first, divided by the second.
        returns: (batch, response), float32, 0 outside the mask.
    """

    score_clipped: Tensor
    value_scale: Tensor
    returns: Tensor


@dataclass(frozen=True)
class GroupExperience(Evaluated):
    """A rollout as GRPO learns from it; ``advantages`` are multiplied by the weights.

    Attributes:
        weights: (batch,), float32: the factor of each response's loss by ``loss_normalization``; 0 if it does not take
            part.
    """

    weights: Tensor


@dataclass(frozen=True)
class RewardShaping:
    """How scores become per-token rewards; the fields are those of PpoSpec.

    Attributes:
        standardize: brings scores (batch,) to the scale on which they are clipped.
        gather: given if per-token rewards are to be whitened. Collective.
    """

    kl_coef: float
    score_clip: float
    missing_eos_penalty: float
    standardize: Callable[[Tensor], Tensor] | None = None
    gather: GatherMoments | None = None

    def __call__(self, stats: TokenStats, scores: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards of the tokens: (batch, response), 0 outside the mask; and ``Experience.score_clipped``.

        Args:
            scores: (batch,), NaN where there is none.
            ended: (batch,), bool; True where a response ended with EOS.
        """
        scaled = self.standardize(scores) if self.standardize else scores
        kept = scaled.clamp(-self.score_clip, self.score_clip)
        clipped = (kept != scaled).float().where(~scores.isnan(), torch.nan)
        # The penalty comes after the clip: the worst responses must not be the ones that do not feel it.
        penalized = kept.nan_to_num(0.0) - self.missing_eos_penalty * ~ended
        rewards = ppo.kl_shaped_rewards(stats.log_probs, stats.ref_log_probs, penalized, stats.mask, self.kl_coef)
        if self.gather is not None:
            moments = Moments.merge(self.gather(Moments.of(rewards[stats.mask])))
            rewards = (moments.standardize(rewards) + moments.mean) * stats.mask
        return rewards, clipped


@torch.no_grad()
def evaluate_tokens(
    rollout: Rollout, plan: list[list[int]], actor: Any, critic: Any | None, ref: Any | None, temperature: float,
    device: torch.device,
) -> TokenStats:  # fmt: skip
    """One forward pass per model and micro-batch; the actor's comes last. The models are in eval mode.

    Args:
        plan: the rows of each micro-batch, together each row once. Every rank has the same number of
            micro-batches; an empty one only keeps ranks in sync.
    """
    columns: dict[int, Tensor] = {}
    for rows in plan:
        batch, response = rollout.batch(rows or [0], device)
        ref_log_probs = None if ref is None else ref(batch.ids, batch.lengths, response, temperature)[0]
        values = None if critic is None else critic(batch.ids, batch.lengths)[response - 1].float()
        log_probs, entropies = actor(batch.ids, batch.lengths, response, temperature, True)
        outputs = (
            log_probs,
            log_probs if ref_log_probs is None else ref_log_probs,
            torch.zeros_like(log_probs) if values is None else values,
            entropies,
        )
        stacked = torch.stack(outputs, dim=1)
        sizes = [rollout.response_lengths[row] for row in rows or [0]]
        columns.update(zip(rows or [0], stacked.split(sizes), strict=True))
    ordered = [columns[row] for row in range(len(rollout))]
    return TokenStats(rollout.mask(device), *torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True).unbind(dim=2))


def make_experience(
    rollout: Rollout, stats: TokenStats, scores: Tensor, shaping: RewardShaping, estimate: AdvantageEstimator,
    eos_id: int, value_scale: tuple[float, float] = (0.0, 1.0),
) -> Experience:  # fmt: skip
    """Shape the rewards of a rollout and estimate its advantages.

    Args:
        stats: with the critic's outputs as values.
        scores: (batch,), NaN where there is none.
        value_scale: see ``Experience``.
    """
    device = stats.mask.device
    scale = torch.tensor(value_scale, device=device)
    stats = replace(stats, values=scaled_values(stats.values, scale) * stats.mask)
    rewards, clipped = shaping(stats, scores, rollout.ended(eos_id, device))
    advantages, returns = estimate(rewards, stats.values, stats.mask)
    return Experience(
        **vars(stats), rollout=rollout, scores=scores, score_clipped=clipped, value_scale=scale,
        advantages=advantages, returns=returns,
    )  # fmt: skip


def scaled_values(outputs: Tensor, scale: Tensor) -> Tensor:
    """The critic's outputs on the scale of the rewards; see ``Experience.value_scale``."""
    return (outputs - scale[0]) / scale[1]


def gather_moments(world: World, own: Moments) -> list[Moments]:
    """The moments of every share of the samples. Collective."""
    return [Moments(*each) for each in world.gather_data(astuple(own))]


def whiten(experience: Experience, gather: GatherMoments) -> Experience:
    """Bring the advantages over all ranks to mean 0 and variance 1."""
    moments = Moments.merge(gather(Moments.of(experience.advantages[experience.mask])))
    return replace(experience, advantages=moments.standardize(experience.advantages) * experience.mask)
