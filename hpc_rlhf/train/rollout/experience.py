"""Experience: sampled answers with all that PPO learns from, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.algorithms.logprobs import entropy, token_log_probs
from hpc_rlhf.train.algorithms.reward import score
from hpc_rlhf.train.models.load import call, positions


@dataclass(frozen=True)
class Rollout:
    """Prompts and sampled answers.

    Attributes:
        input_ids: (batch, prompt + answer), int64; prompts padded on the left, answers on the right.
        mask: (batch, prompt + answer), bool; True on real tokens.
        answer_mask: (batch, answer), bool; True on real answer tokens, EOS included.
    """

    input_ids: Tensor
    mask: Tensor
    answer_mask: Tensor

    @property
    def width(self) -> int:
        """Positions of the answers."""
        return self.answer_mask.shape[1]

    @property
    def answers(self) -> Tensor:
        return self.input_ids[:, -self.width :]

    @classmethod
    def join(cls, prompt_ids: Tensor, prompt_mask: Tensor, answers: Tensor, answer_mask: Tensor) -> Rollout:
        return cls(
            torch.cat([prompt_ids, answers], dim=1), torch.cat([prompt_mask, answer_mask], dim=1), answer_mask
        )


@dataclass(frozen=True)
class Experience:
    """A rollout as PPO learns from it; all but the scores are (batch, answer), float32.

    Attributes:
        log_probs, ref_log_probs: of the sampled tokens, by the actor that sampled them and by the reference.
        values: of the state before each token.
        scores: (batch,), the reward model's.
        advantages, returns: of generalised advantage estimation.
        entropies: of the distributions sampled from.
    """

    rollout: Rollout
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor
    entropies: Tensor


def answer_logits(model: Any, rollout: Rollout) -> Tensor:
    """Logits that predict the answer tokens: (batch, answer, vocabulary)."""
    logits = call(model, rollout.input_ids, rollout.mask, positions(rollout.mask)).logits
    return logits[:, -rollout.width - 1 : -1]


def answer_values(model: Any, rollout: Rollout) -> Tensor:
    """The critic's values of the states before the answer tokens: (batch, answer), float32."""
    values = model(rollout.input_ids, rollout.mask, positions(rollout.mask))
    return values[:, -rollout.width - 1 : -1].float()


@torch.no_grad()
def answer_scores(model: Any, rollout: Rollout) -> Tensor:
    """The reward model's scores of whole sequences: (batch,), float32."""
    values = model(rollout.input_ids, rollout.mask, positions(rollout.mask))
    return score(values.float(), rollout.mask)


@dataclass(frozen=True)
class Rewarding:
    """How scores become rewards and advantages; the fields are those of PpoSpec."""

    temperature: float
    kl_coef: float
    score_clip: float
    missing_eos_penalty: float
    gamma: float
    lam: float


@torch.no_grad()
def experience(
    rollout: Rollout, actor: Any, critic: Any, ref: Any, reward: Any, rewarding: Rewarding, eos_id: int
) -> Experience:
    """Everything PPO needs of a rollout. The models are in eval mode; each makes one forward pass."""
    logits = answer_logits(actor, rollout)
    log_probs = token_log_probs(logits, rollout.answers, rewarding.temperature)
    entropies = entropy(logits, rewarding.temperature)
    del logits
    ref_log_probs = token_log_probs(answer_logits(ref, rollout), rollout.answers, rewarding.temperature)
    values = answer_values(critic, rollout)
    scores = answer_scores(reward, rollout)
    ended = ((rollout.answers == eos_id) & rollout.answer_mask).any(dim=1)
    rewards = ppo.kl_shaped_rewards(
        log_probs, ref_log_probs, scores - rewarding.missing_eos_penalty * ~ended,
        rollout.answer_mask, rewarding.kl_coef, rewarding.score_clip,
    )  # fmt: skip
    advantages, returns = ppo.generalized_advantages(
        values, rewards, rollout.answer_mask, rewarding.gamma, rewarding.lam
    )
    return Experience(rollout, log_probs, ref_log_probs, values, scores, advantages, returns, entropies)


def whiten(
    batches: list[Experience], sums: Callable[[dict[str, float]], dict[str, float]]
) -> list[Experience]:
    """Bring the advantages over all ranks to mean 0 and variance 1.

    Args:
        sums: adds numbers up over the ranks.
    """
    local = {"count": 0.0, "sum": 0.0, "squares": 0.0}
    for batch in batches:
        real = batch.advantages[batch.rollout.answer_mask].double()
        local["count"] += real.numel()
        local["sum"] += real.sum().item()
        local["squares"] += (real**2).sum().item()
    total = sums(local)
    mean = total["sum"] / total["count"]
    spread = max(total["squares"] / total["count"] - mean**2, 0.0) ** 0.5
    return [
        replace(batch, advantages=(batch.advantages - mean) / (spread + 1e-8) * batch.rollout.answer_mask)
        for batch in batches
    ]
