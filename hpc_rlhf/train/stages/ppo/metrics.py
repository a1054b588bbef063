"""Metrics of PPO's steps."""

from __future__ import annotations

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.rollout.experience import Experience, gather_moments
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.policy.metrics import learned, mixed

# Sums over the response tokens of all optimizer steps on an experience; ``tokens`` counts them. The last two are
# sums over the pretraining mixture's tokens. Checkpoints keep the sums in this order.
STATS = (
    "actor_loss", "critic_loss", "ratio", "approx_kl", "clipped", "value_clipped", "tokens", "ptx_loss", "ptx_tokens",
)  # fmt: skip


def summarize(
    experience: Experience, stats: dict[str, float], spec: PpoSpec, eos_id: int, world: World
) -> dict[str, float | None]:
    """A step's metrics, over all ranks. Collective.

    Args:
        experience: this rank's.
        stats: this rank's ``Progress.sums``.

    Returns:
        reward and reward_std of the scores; score_clipfrac, the share of them that score_clip changed; kl (k3, nats per
        response), None if top_p or top_k truncate the distribution that responses are drawn from: the log-probabilities
        are of the whole one; entropy (nats per token) of the whole distribution; ratio, approx_kl (k3 from the actor
        that sampled, nats per token), clipfrac and value_clipfrac over the tokens learned from; passes over the
        experience; eos_rate, the share of responses that end with EOS; answer_tokens, their mean length; actor_loss and
        critic_loss, means over tokens; actor_grad_norm and critic_grad_norm, means over the optimizer steps, before
        clipping; explained_variance of the returns by the values; skipped, optimizer steps that DeepSpeed skipped
        because a gradient was not finite. With a pretraining mixture also ptx_loss (nats per token), and ptx_share; see
        ``mixed``.
    """
    mask, scores, clipped = experience.mask, experience.scores, experience.score_clipped
    known = ~clipped.isnan()
    returns = experience.returns[mask].double()
    own = (
        Moments.of(scores[~scores.isnan()]),
        Moments.of(returns),
        Moments.of((experience.returns - experience.values)[mask].double()),
    )
    scored, outcomes, errors = (Moments.merge(gather_moments(world, moments)) for moments in own)
    local = {
        "responses": float(len(scores)),
        "taking_part": float(mask.any(dim=1).sum()),
        "tokens": float(returns.numel()),
        "all_tokens": float(sum(experience.rollout.response_lengths)),
        "kl": ppo.k3_kl(experience.log_probs, experience.ref_log_probs, mask).sum().item(),
        "entropy": experience.entropies[mask].sum().item(),
        "score_clipped": clipped[known].sum().item(),
        "score_known": float(known.sum()),
        "ended": experience.rollout.ended(eos_id, mask.device).sum().item(),
    }
    total = world.sums({**local, **{f"learned_{name}": stats[name] for name in STATS}})
    responses, tokens = total["responses"], total["tokens"] or 1.0
    learned_tokens = total["learned_tokens"] or 1.0
    actor_loss = total["learned_actor_loss"] / learned_tokens
    return {
        "reward": scored.mean if scored.count else None,
        "reward_std": scored.std,
        "score_clipfrac": total["score_clipped"] / total["score_known"] if total["score_known"] else None,
        "kl": None if spec.truncates or not total["taking_part"] else total["kl"] / total["taking_part"],
        "entropy": total["entropy"] / tokens,
        **learned(total),
        "value_clipfrac": total["learned_value_clipped"] / learned_tokens,
        "passes": learned_tokens / tokens,
        "eos_rate": total["ended"] / responses,
        "answer_tokens": total["all_tokens"] / responses,
        "actor_loss": actor_loss,
        "critic_loss": total["learned_critic_loss"] / learned_tokens,
        "actor_grad_norm": stats["actor_grad_norm"],
        "critic_grad_norm": stats["critic_grad_norm"],
        "explained_variance": 1 - errors.variance / outcomes.variance if outcomes.variance > 0 else 0.0,
        "skipped": stats["skipped"],
        **mixed(total, actor_loss, spec),
    }
