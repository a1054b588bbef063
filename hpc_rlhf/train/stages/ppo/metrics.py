"""What a step of PPO did, in the numbers that are logged."""

from __future__ import annotations

from collections.abc import Callable

from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.rollout.experience import Experience

# Sums over the answer tokens of all optimizer steps of a rollout; ``tokens`` counts them.
LEARNT = ("actor_loss", "critic_loss", "ratio", "approx_kl", "clipped", "value_clipped", "tokens")


def summarize(
    made: Experience,
    learnt: dict[str, float],
    eos_id: int,
    sums: Callable[[dict[str, float]], dict[str, float]],
) -> dict[str, float]:
    """A step's metrics, over all ranks.

    Args:
        made: this rank's experience.
        learnt: this rank's sums, by the names in LEARNT.
        sums: adds numbers up over the ranks.

    Returns:
        reward and reward_std of the scores; kl (k3, nats an answer); entropy (nats a token); ratio, approx_kl (k3
        from the actor that sampled, nats a token), clipfrac and value_clipfrac over the tokens learnt from; passes
        over the experience that were made; eos_rate, the share of answers that end; answer_tokens, their mean
        length; actor_loss and critic_loss, means over tokens; explained_variance of the returns by the values.
    """
    mask = made.mask
    returns, errors = made.returns[mask].double(), (made.returns - made.values)[mask].double()
    local = {
        "answers": float(len(made.scores)),
        "tokens": float(returns.numel()),
        "score": made.scores.double().sum().item(),
        "score2": (made.scores.double() ** 2).sum().item(),
        "kl": ppo.k3_kl(made.log_probs, made.ref_log_probs, mask).sum().item(),
        "entropy": made.entropies[mask].sum().item(),
        "ended": made.rollout.ended(eos_id, mask.device).sum().item(),
        "ret": returns.sum().item(),
        "ret2": (returns**2).sum().item(),
        "err": errors.sum().item(),
        "err2": (errors**2).sum().item(),
    }
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
        "approx_kl": total["learnt_approx_kl"] / learnt_tokens,
        "clipfrac": total["learnt_clipped"] / learnt_tokens,
        "value_clipfrac": total["learnt_value_clipped"] / learnt_tokens,
        "passes": learnt_tokens / tokens,
        "eos_rate": total["ended"] / answers,
        "answer_tokens": tokens / answers,
        "actor_loss": total["learnt_actor_loss"] / learnt_tokens,
        "critic_loss": total["learnt_critic_loss"] / learnt_tokens,
        "explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
    }
