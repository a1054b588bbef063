"""Moments of parts merge to the moments of the whole."""

from __future__ import annotations

import pytest
import torch

from hpc_rlhf.train.algorithms.moments import Moments


@pytest.mark.parametrize("sizes", [[12], [1, 11], [5, 0, 3, 4], [0, 12], [1] * 12])
def test_merged_parts_have_the_moments_of_the_whole(sizes: list[int]) -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 3 + 5
    moments = Moments.merge(Moments.of(part) for part in values.split(sizes))
    assert moments.count == 12
    assert moments.mean == pytest.approx(values.double().mean().item())
    assert moments.std == pytest.approx(values.double().std(correction=0).item())


def test_a_large_mean_does_not_cancel_the_spread() -> None:
    """The sums of squares are about 1e16 here, and their difference would be noise."""
    values = 1e8 + torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    moments = Moments.merge([Moments.of(values[:1]), Moments.of(values[1:])])
    assert moments.std == pytest.approx(1.25**0.5, rel=1e-9)


def test_standardized_values_have_mean_0_and_variance_1() -> None:
    values = torch.randn(50) * 7 - 2
    moments = Moments.of(values).standardize(values)
    torch.testing.assert_close(moments.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(moments.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_one_number_alone_has_no_spread() -> None:
    assert Moments.of(torch.tensor([4.0])).standardize(torch.tensor([4.0])).item() == 0.0
    assert Moments().std == 0.0
