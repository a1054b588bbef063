"""Metrics that PPO and GRPO share."""

from __future__ import annotations

from collections.abc import Mapping

from hpc_rlhf.spec.stages.policy import PolicySpec


def learned(total: Mapping[str, float]) -> dict[str, float]:
    """The mean ratio, approx_kl (k3 from the actor that sampled, nats per token) and clipfrac, over the tokens that the
    actor learned from.

    Args:
        total: the sums of ``Progress.sums`` over all ranks, with learned_ before their names.
    """
    tokens = total["learned_tokens"] or 1.0
    names = {"ratio": "ratio", "approx_kl": "approx_kl", "clipped": "clipfrac"}
    return {metric: total[f"learned_{name}"] / tokens for name, metric in names.items()}


def mixed(total: Mapping[str, float], surrogate: float, spec: PolicySpec) -> dict[str, float]:
    """With a pretraining mixture, its loss (ptx_loss, nats per token), and ptx_share: its weighted loss in the sum of
    that and the actor's, both taken as positive.

    Args:
        total: see ``learned``.
        surrogate: the actor's mean loss.
    """
    if not total["learned_ptx_tokens"]:
        return {}
    loss = total["learned_ptx_loss"] / total["learned_ptx_tokens"]
    weighted = spec.ptx_coef * loss
    return {"ptx_loss": loss, "ptx_share": weighted / (weighted + abs(surrogate)) if weighted else 0.0}
