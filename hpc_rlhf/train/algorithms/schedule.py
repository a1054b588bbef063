"""Learning-rate schedules as factors of the peak rate."""

from __future__ import annotations

import math


def phase_steps(steps: float, total: int) -> int:
    """Steps of a warm-up or decay, at most those of the stage.

    Args:
        steps: below 1 a fraction of all steps, otherwise their number.
        total: optimizer steps of the whole stage.
    """
    return min(total, round(steps * total) if steps < 1 else int(steps))


def factor(schedule: str, step: int, warmup: int, total: int, decay: int = 0, final: float = 0.0) -> float:
    """The factor of the peak learning rate at an optimizer step.

    Args:
        schedule: ``cosine``, ``linear``, ``wsd`` or ``constant``.
        step: optimizer steps made so far.
        warmup: steps over which the factor rises linearly from 0 to 1; at most the total.
        total: optimizer steps that the stage makes, without those that are skipped.
        decay: steps at the end over which the factor of ``wsd`` falls.
        final: where all but ``constant`` end.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    start = max(warmup, total - decay) if schedule == "wsd" else warmup
    progress = min(1.0, max(0, step - start) / max(1, total - start))
    fallen = 0.5 * (1 - math.cos(math.pi * progress)) if schedule == "cosine" else progress
    return 1 - (1 - final) * fallen
