"""How the ranks of a stage are laid out over the dimensions of parallelism."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from hpc_rlhf.errors import HpcRlhfError


@dataclass(frozen=True)
class ParallelDims:
    """The size of each dimension, outermost first: neighbouring ranks differ in the last one, which
    communicates most.

    A new dimension is a new field. Ranks that differ in ``data`` have different samples; those that differ
    only in other dimensions work on the same samples, with the same random numbers.

    Attributes:
        data: ranks, or groups of ranks, with samples of their own.
        tensor: ranks that share each layer.
    """

    data: int
    tensor: int = 1

    @classmethod
    def of(cls, ranks: int, tensor: int = 1) -> ParallelDims:
        """The layout of a number of ranks.

        Raises:
            HpcRlhfError: they cannot be divided into groups of that size.
        """
        if ranks % tensor:
            raise HpcRlhfError(
                f"{ranks} ranks cannot be divided into groups of {tensor}",
                where="tensor_parallel",
                hint="start a multiple of tensor_parallel ranks",
            )
        return cls(ranks // tensor, tensor)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, field.name) for field in fields(self))

    def coordinate(self, dim: str, rank: int) -> int:
        """A rank's place along a dimension."""
        size: int = getattr(self, dim)
        return rank // self._stride(dim) % size

    def group(self, dim: str, rank: int) -> list[int]:
        """The ranks that differ from one, or not at all, in a dimension only; in the order of that
        dimension."""
        stride = self._stride(dim)
        first = rank - self.coordinate(dim, rank) * stride
        return [first + place * stride for place in range(getattr(self, dim))]

    @property
    def sample_owners(self) -> list[int]:
        """One rank for each share of the samples, in order of the shares: the first of those that work on
        it."""
        return self.group("data", 0)

    def _stride(self, dim: str) -> int:
        names = [field.name for field in fields(self)]
        return math.prod(getattr(self, name) for name in names[names.index(dim) + 1 :])
