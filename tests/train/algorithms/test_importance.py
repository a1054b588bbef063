"""Truncated importance sampling."""

from __future__ import annotations

import torch

from hpc_rlhf.train.algorithms.importance import mismatch_kl, truncated_weights


def test_weights_are_ratios_up_to_the_cap() -> None:
    actor, sampler = torch.log(torch.tensor([0.5, 0.2, 0.9])), torch.log(torch.tensor([0.5, 0.4, 0.3]))
    weights, truncated = truncated_weights(actor, sampler, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5, 2.0]))
    assert truncated.tolist() == [False, False, True]


def test_weighted_and_uncapped_the_mean_is_that_of_the_actors_distribution() -> None:
    actor, sampler = torch.randn(5, dtype=torch.float64).softmax(0), torch.randn(5, dtype=torch.float64).softmax(0)
    values = torch.randn(5, dtype=torch.float64)
    weights, _ = truncated_weights(actor.log(), sampler.log(), 1e9)
    torch.testing.assert_close((sampler * weights * values).sum(), (actor * values).sum())


def test_the_mismatch_is_the_kl_in_expectation_and_never_negative() -> None:
    actor, sampler = torch.randn(5, dtype=torch.float64).softmax(0), torch.randn(5, dtype=torch.float64).softmax(0)
    each = mismatch_kl(actor.log(), sampler.log())
    assert (each >= 0).all()
    torch.testing.assert_close((sampler * each).sum(), (sampler * (sampler.log() - actor.log())).sum())
