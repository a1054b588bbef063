"""Learning-rate schedules as factors of the peak rate."""

from __future__ import annotations

import math


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of a warm-up, which ends with the stage at the latest.

    Args:
        warmup: below 1 a fraction of all steps, otherwise their number.
        total: optimizer steps of the whole stage.
    """
    return min(total, round(warmup * total) if warmup < 1 else int(warmup))


def factor(schedule: str, step: int, warmup: int, total: int) -> float:
    """The factor of the peak learning rate at an optimizer step.

    Args:
        schedule: ``cosine`` or ``linear`` (both end at 0), or ``constant``.
        step: optimizer steps made so far.
        warmup: steps over which the factor rises linearly from 0 to 1; at most the total.
        total: optimizer steps that the stage makes, without those that are skipped.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
