"""Mean and variance of numbers that come in parts: from several ranks, or from one step after another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean, and sum of squared deviations from the mean; of no numbers by default."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of all numbers in a tensor, in float64."""
        wide = values.double().flatten()
        if not len(wide):
            return cls()
        mean = wide.mean()
        return cls(float(len(wide)), mean.item(), (wide - mean).square().sum().item())

    @classmethod
    def merge(cls, parts: Iterable[Moments]) -> Moments:
        """Of all parts together (Chan, Golub and LeVeque 1979); unlike E[x²] − E[x]², it loses no digits."""
        return reduce(cls._add, parts)

    def _add(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        distance = other.mean - self.mean
        return Moments(
            count,
            self.mean + distance * other.count / count,
            self.squares + other.squares + distance**2 * self.count * other.count / count,
        )

    @property
    def variance(self) -> float:
        """Population variance; 0 without numbers."""
        return self.squares / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        return float(self.variance**0.5)

    def standardize(self, values: Tensor) -> Tensor:
        """Values minus the mean, in standard deviations; 0 if all numbers were the same."""
        return (values - self.mean) / (self.std + 1e-8)
