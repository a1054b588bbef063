"""What a step of PPO did, in the numbers that are logged."""

from __future__ import annotations

from collections.abc import Callable

from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.rollout.experience import Experience

# Sums over the answer tokens of all optimizer steps of a rollout; ``tokens`` counts them.
LEARNT = ("actor_loss", "critic_loss", "ratio", "clipped", "value_clipped", "tokens")


def summarize(
    batches: list[Experience],
    learnt: dict[str, float],
    eos_id: int,
    sums: Callable[[dict[str, float]], dict[str, float]],
) -> dict[str, float]:
    """A step's metrics, over all ranks.

    Args:
        batches: this rank's experience.
        learnt: this rank's sums, by the names in LEARNT.
        sums: adds numbers up over the ranks.

    Returns:
        reward and reward_std of the scores; kl (k3, nats an answer); entropy (nats a token); ratio, clipfrac and
        value_clipfrac over the tokens learnt from; eos_rate, the share of answers that end; answer_tokens, their
        mean length; actor_loss and critic_loss, means over tokens; explained_variance of the returns by the values.
    """
    local = dict.fromkeys(
        ("answers", "tokens", "score", "score2", "kl", "entropy", "ended", "ret", "ret2", "err", "err2"), 0.0
    )
    for batch in batches:
        mask = batch.rollout.answer_mask
        local["answers"] += len(batch.scores)
        local["tokens"] += mask.sum().item()
        local["score"] += batch.scores.sum().item()
        local["score2"] += (batch.scores.double() ** 2).sum().item()
        local["kl"] += ppo.k3_kl(batch.log_probs, batch.ref_log_probs, mask).sum().item()
        local["entropy"] += batch.entropies[mask].sum().item()
        local["ended"] += ((batch.rollout.answers == eos_id) & mask).any(dim=1).sum().item()
        returns, errors = batch.returns[mask].double(), (batch.returns - batch.values)[mask].double()
        local["ret"] += returns.sum().item()
        local["ret2"] += (returns**2).sum().item()
        local["err"] += errors.sum().item()
        local["err2"] += (errors**2).sum().item()
    total = sums({**local, **{f"learnt_{name}": learnt[name] for name in LEARNT}})
    answers, tokens, learnt_tokens = total["answers"], total["tokens"], total["learnt_tokens"]
    mean = total["score"] / answers
    variance = total["ret2"] / tokens - (total["ret"] / tokens) ** 2
    unexplained = total["err2"] / tokens - (total["err"] / tokens) ** 2
    return {
        "reward": mean,
        "reward_std": max(total["score2"] / answers - mean**2, 0.0) ** 0.5,
        "kl": total["kl"] / answers,
        "entropy": total["entropy"] / tokens,
        "ratio": total["learnt_ratio"] / learnt_tokens,
        "clipfrac": total["learnt_clipped"] / learnt_tokens,
        "value_clipfrac": total["learnt_value_clipped"] / learnt_tokens,
        "eos_rate": total["ended"] / answers,
        "answer_tokens": tokens / answers,
        "actor_loss": total["learnt_actor_loss"] / learnt_tokens,
        "critic_loss": total["learnt_critic_loss"] / learnt_tokens,
        "explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
    }
