"""Metrics of GRPO's steps."""

from __future__ import annotations

from torch import Tensor

from hpc_rlhf.spec.stages import GrpoSpec
from hpc_rlhf.train.algorithms import group_advantages, ppo
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.rollout.experience import GroupExperience, gather_moments
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.policy.metrics import learned, mixed

# Sums over the response tokens of all optimizer steps on an experience; ``tokens`` and ``responses`` count these. The
# last two are sums over the pretraining mixture's tokens. Checkpoints keep the sums in this order.
STATS = ("actor_loss", "ratio", "approx_kl", "clipped", "tokens", "responses", "ptx_loss", "ptx_tokens")


def summarize(
    experience: GroupExperience, stats: dict[str, float], spec: GrpoSpec, eos_id: int, world: World
) -> dict[str, float | None]:
    """A step's metrics, over all ranks. Collective.

    Args:
        experience: this rank's.
        stats: this rank's ``Progress.sums``.

    Returns:
        kl (k3, nats per response), None without a reference, or if top_p or top_k truncate the distribution; entropy
        (nats per token) of the whole distribution; the loss, and the metrics of ``learned`` and ``mixed``; passes over
        the experience; eos_rate, the share of responses that end with EOS; answer_tokens, their mean length; masked,
        the share of responses that take no part in training; grad_norm, the mean over the optimizer steps before
        clipping; skipped, optimizer steps that DeepSpeed skipped because a gradient was not finite. ``kl`` and
        ``entropy`` cover the responses that take part.
    """
    mask, takes_part = experience.mask, experience.weights > 0
    local = {
        "responses": float(len(takes_part)),
        "taking_part": float(takes_part.sum()),
        "tokens": float(sum(experience.rollout.response_lengths)),
        "own_tokens": float(mask.sum()),
        "kl": ppo.k3_kl(experience.log_probs, experience.ref_log_probs, mask).sum().item(),
        "entropy": experience.entropies[mask].sum().item(),
        "ended": experience.rollout.ended(eos_id, mask.device).sum().item(),
    }
    total = world.sums({**local, **{f"learned_{name}": stats[name] for name in STATS}})
    responses, tokens = total["responses"], total["own_tokens"] or 1.0
    loss = total["learned_actor_loss"] / (total[f"learned_{spec.mean_over}"] or 1.0)
    return {
        "kl": total["kl"] / (total["taking_part"] or 1.0) if spec.kl_coef and not spec.truncates else None,
        "entropy": total["entropy"] / tokens,
        **learned(total),
        "loss": loss,
        "passes": total["learned_tokens"] / tokens,
        "eos_rate": total["ended"] / responses,
        "answer_tokens": total["tokens"] / responses,
        "masked": 1 - total["taking_part"] / responses,
        "grad_norm": stats["actor_grad_norm"],
        "skipped": stats["skipped"],
        **mixed(total, loss, spec),
    }


def compare(scores: Tensor, groups: Tensor, world: World) -> dict[str, float | None]:
    """Metrics of scores, over all ranks. Collective.

    Args:
        scores: (batch,), this rank's; NaN where there is none.
        groups: (batch,), int64; the number of each response's prompt.

    Returns:
        reward and reward_std of the scores; frac_reward_zero_std, the share of the groups in which all scores are the
        same.
    """
    scored = Moments.merge(gather_moments(world, Moments.of(scores[~scores.isnan()])))
    differs = group_advantages.varied(scores, groups)
    total = world.sums({"groups": float(len(differs)), "flat": float((~differs).sum())})
    return {
        "reward": scored.mean if scored.count else None,
        "reward_std": scored.std if scored.count else None,
        "frac_reward_zero_std": total["flat"] / total["groups"],
    }
