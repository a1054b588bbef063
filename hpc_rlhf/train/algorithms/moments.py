"""Mean and variance of numbers that come in parts: from many ranks, and from one step after another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean, and sum of the squared distances from the mean; of no numbers, if nothing is given."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of all numbers in a tensor."""
        wide = values.double().flatten()
        if not len(wide):
            return cls()
        mean = wide.mean()
        return cls(float(len(wide)), mean.item(), (wide - mean).square().sum().item())

    def merged(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque 1979): exact where sums of squares would cancel out."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * other.count / count,
            self.squares + other.squares + apart**2 * self.count * other.count / count,
        )

    @property
    def std(self) -> float:
        return float((self.squares / self.count) ** 0.5) if self.count else 0.0

    def standardized(self, values: Tensor) -> Tensor:
        """Values with the mean taken off, in standard deviations; 0 where all numbers were the same."""
        return (values - self.mean) / (self.std + 1e-8)
