"""Experience: sampled answers with all that PPO learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.ragged import Ragged

# Adds numbers up over the ranks.
Sums = Callable[[dict[str, float]], dict[str, float]]


@dataclass(frozen=True)
class Rollout:
    """Prompts and sampled answers, as token ids; an answer ends with EOS unless it was cut, and is never empty."""

    prompts: list[list[int]]
    answers: list[list[int]]

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with its answer."""
        return [len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Ragged, Tensor]:
        """Some rows end to end, and the indices of their answer tokens: (answer tokens,), int64."""
        batch = Ragged.of([self.prompts[row] + self.answers[row] for row in rows], device)
        return batch, batch.tail([len(self.answers[row]) for row in rows])

    def mask(self, device: torch.device) -> Tensor:
        """(batch, answer), bool; True on real answer tokens, EOS included."""
        return ragged.mask([len(answer) for answer in self.answers], device)

    def ended(self, eos_id: int, device: torch.device) -> Tensor:
        """(batch,), bool; True where an answer came to its end by itself."""
        return torch.tensor([answer[-1] == eos_id for answer in self.answers], device=device)


@dataclass(frozen=True)
class Experience:
    """A rollout as PPO learns from it; all but the scores are (batch, answer), float32, 0 behind an answer's end.

    Attributes:
        mask: (batch, answer), bool; True on real answer tokens, EOS included.
        log_probs, ref_log_probs: of the sampled tokens, by the actor that sampled them and by the reference.
        values: of the state before each token.
        scores: (batch,), the reward model's.
        advantages, returns: of generalised advantage estimation.
        entropies: of the distributions sampled from.
    """

    rollout: Rollout
    mask: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class Rewarding:
    """How scores become rewards and advantages; the numbers are those of PpoSpec.

    Attributes:
        standardized: brings scores (batch,) to the scale on which they are clipped. Collective.
        reward_sums: given where per-token rewards are to be whitened.
    """

    temperature: float
    kl_coef: float
    score_clip: float
    missing_eos_penalty: float
    gamma: float
    lam: float
    standardized: Callable[[Tensor], Tensor] | None = None
    reward_sums: Sums | None = None


@torch.no_grad()
def scores(reward: Any, rollout: Rollout, plan: list[list[int]], device: torch.device) -> Tensor:
    """The reward model's scores of whole sequences: (batch,), float32; for the plan see ``experience``."""
    found = torch.zeros(len(rollout), device=device)
    for rows in plan:
        batch, _ = rollout.batch(rows or [0], device)
        ends = batch.tail([1] * len(batch.lengths))
        values = reward(batch.ids, batch.lengths)[ends].float()
        found[rows or [0]] = values
    return found


@torch.no_grad()
def experience(
    rollout: Rollout, plan: list[list[int]], actor: Any, critic: Any, ref: Any, reward: Any,
    rewarding: Rewarding, eos_id: int, device: torch.device,
) -> Experience:  # fmt: skip
    """Everything PPO needs of a rollout. The models are in eval mode; each makes one forward pass a micro-batch, the
    actor the last.

    Args:
        plan: the rows of each micro-batch, together each row once. An empty one only keeps step with other
            ranks. Every rank has as many.
    """
    parts: dict[int, Tensor] = {}
    found_scores = scores(reward, rollout, plan, device)
    for rows in plan:
        batch, answer = rollout.batch(rows or [0], device)
        ref_log_probs, _ = ref(batch.ids, batch.lengths, answer, rewarding.temperature)
        values = critic(batch.ids, batch.lengths)[answer - 1].float()
        log_probs, entropies = actor(batch.ids, batch.lengths, answer, rewarding.temperature, True)
        found = torch.stack([log_probs, ref_log_probs, values, entropies], dim=1)
        sizes = [len(rollout.answers[row]) for row in rows or [0]]
        parts.update(zip(rows or [0], found.split(sizes), strict=True))
    mask = rollout.mask(device)
    ordered = torch.nn.utils.rnn.pad_sequence([parts[row] for row in range(len(rollout))], batch_first=True)
    log_probs, ref_log_probs, values, entropies = ordered.unbind(dim=2)
    earned = rewarding.standardized(found_scores) if rewarding.standardized else found_scores
    rewards = ppo.kl_shaped_rewards(
        log_probs, ref_log_probs,
        earned - rewarding.missing_eos_penalty * ~rollout.ended(eos_id, device),
        mask, rewarding.kl_coef, rewarding.score_clip,
    )  # fmt: skip
    if rewarding.reward_sums:
        mean, spread = _moments(rewards[mask], rewarding.reward_sums)
        rewards = ((rewards - mean) / (spread + 1e-8) + mean) * mask
    advantages, returns = ppo.generalized_advantages(values, rewards, mask, rewarding.gamma, rewarding.lam)
    return Experience(
        rollout, mask, log_probs, ref_log_probs, values, found_scores, advantages, returns, entropies
    )


def whiten(made: Experience, sums: Sums) -> Experience:
    """Bring the advantages over all ranks to mean 0 and variance 1."""
    mean, spread = _moments(made.advantages[made.mask], sums)
    return replace(made, advantages=(made.advantages - mean) / (spread + 1e-8) * made.mask)


def _moments(real: Tensor, sums: Sums) -> tuple[float, float]:
    """Mean and standard deviation of numbers over all ranks."""
    real = real.double()
    total = sums({"count": real.numel(), "sum": real.sum().item(), "squares": (real**2).sum().item()})
    mean = total["sum"] / total["count"]
    return mean, max(total["squares"] / total["count"] - mean**2, 0.0) ** 0.5
