"""The meter of live tensors matches known sums."""

from __future__ import annotations

import torch

from tests.benchmarks.allocations import Allocations

SQUARE = 64 * 64 * 4


def test_what_lives_counts_once_and_leaves_when_freed() -> None:
    with Allocations() as meter:
        first = torch.zeros(64, 64)
        view = first.view(-1)[10:]
        view += 1
        assert meter.live == SQUARE
        del first
        assert meter.live == SQUARE
        del view
        assert (meter.live, meter.peak) == (0, SQUARE)


def test_what_backward_needs_lives_until_backward() -> None:
    with Allocations() as meter:
        weights = [torch.zeros(64, 64, requires_grad=True) for _ in range(3)]
        value = torch.zeros(64, 64)
        for weight in weights:
            value = value @ weight
        # Three weights, the input, two saved activations and the output.
        assert meter.live == 7 * SQUARE
        value.backward(torch.ones(64, 64))
        del value
        assert meter.live == 6 * SQUARE  # the weights and their gradients
        assert 9 * SQUARE <= meter.peak <= 11 * SQUARE
