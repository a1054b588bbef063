"""The metrics of a PPO step."""

from __future__ import annotations

from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.rollout.experience import Experience
from hpc_rlhf.train.runtime.world import World

# Sums over the response tokens of all optimizer steps on an experience; ``tokens`` counts them.
STATS = ("actor_loss", "critic_loss", "ratio", "approx_kl", "clipped", "value_clipped", "tokens")


def summarize(experience: Experience, stats: dict[str, float], eos_id: int, world: World) -> dict[str, float]:
    """A step's metrics, over all ranks. Collective.

    Args:
        experience: this rank's.
        stats: this rank's sums, by the names in STATS, and ``skipped``.

    Returns:
        reward and reward_std of the scores; kl (k3, nats per response); entropy (nats per token); ratio, approx_kl (k3
        from the actor that sampled, nats per token), clipfrac and value_clipfrac over the tokens learned from; passes
        over the experience; eos_rate, the share of responses that end with EOS; answer_tokens, their mean length;
        actor_loss and critic_loss, means over tokens; explained_variance of the returns by the values; skipped,
        optimizer steps that DeepSpeed skipped because a gradient was not finite.
    """
    mask, scores = experience.mask, experience.scores
    returns = experience.returns[mask].double()
    own = [
        Moments.of(scores[~scores.isnan()]),
        Moments.of(returns),
        Moments.of((experience.returns - experience.values)[mask].double()),
    ]
    rewards, outcomes, errors = map(Moments.merge, zip(*world.gather_data(own), strict=True))
    local = {
        "responses": float(len(scores)),
        "tokens": float(returns.numel()),
        "kl": ppo.k3_kl(experience.log_probs, experience.ref_log_probs, mask).sum().item(),
        "entropy": experience.entropies[mask].sum().item(),
        "ended": experience.rollout.ended(eos_id, mask.device).sum().item(),
    }
    total = world.sums({**local, **{f"learned_{name}": stats[name] for name in STATS}})
    responses, tokens, learned = total["responses"], total["tokens"], total["learned_tokens"]
    return {
        "reward": rewards.mean,
        "reward_std": rewards.std,
        "kl": total["kl"] / responses,
        "entropy": total["entropy"] / tokens,
        "ratio": total["learned_ratio"] / learned,
        "approx_kl": total["learned_approx_kl"] / learned,
        "clipfrac": total["learned_clipped"] / learned,
        "value_clipfrac": total["learned_value_clipped"] / learned,
        "passes": learned / tokens,
        "eos_rate": total["ended"] / responses,
        "answer_tokens": tokens / responses,
        "actor_loss": total["learned_actor_loss"] / learned,
        "critic_loss": total["learned_critic_loss"] / learned,
        "explained_variance": 1 - errors.variance / outcomes.variance if outcomes.variance > 0 else 0.0,
        "skipped": stats["skipped"],
    }
