"""Confidence intervals of means and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval.

    Attributes:
        low, high: infinite for the mean of a single number, whose spread is unknown.
    """

    estimate: float
    low: float
    high: float


def share(successes: float, count: int) -> Interval:
    """Wilson's interval of a proportion (JASA 22, 1927, page 209), also accurate for few samples.

    Args:
        successes: a tie may count half, which makes the interval a little too wide.
        count: number of samples.

    Raises:
        ValueError: there are no samples.
    """
    if count < 1:
        raise ValueError("a share needs samples")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    rate = successes / count
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    # Rounding must not exclude an estimate of 0 or 1.
    return Interval(rate, max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half)))


def mean(values: Sequence[float]) -> Interval:
    """Student's interval of a mean (Biometrika 6, 1908); for paired samples, pass their differences.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a mean needs values")
    count = len(values)
    middle = math.fsum(values) / count
    if count == 1:
        return Interval(middle, -math.inf, math.inf)
    variance = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    half = t_quantile(CONFIDENCE, count - 1) * math.sqrt(variance / count)
    return Interval(middle, middle - half, middle + half)


def t_quantile(confidence: float, freedom: int) -> float:
    """The t such that Student's distribution lies between -t and t with this probability, by bisection.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < confidence else (low, middle)
    return high


def _t_within(t: float, freedom: int) -> float:
    """Probability that Student's t lies between -t and t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
