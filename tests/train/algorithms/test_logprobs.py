"""Log-probabilities, next-token loss and entropy against sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_rlhf.train.algorithms.logprobs import entropy, next_token_loss_sum, token_log_probs


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_token_log_probs_are_the_log_of_the_softmax_at_the_temperature(temperature: float) -> None:
    logits, tokens = torch.randn(2, 3, 5) * 4, torch.randint(5, (2, 3))
    found = token_log_probs(logits, tokens, temperature)
    for row in range(2):
        for t in range(3):
            weights = [math.exp(x / temperature) for x in logits[row, t].tolist()]
            expected = math.log(weights[tokens[row, t]] / sum(weights))
            assert found[row, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits, tokens = (torch.randn(2, 4, 50_000) * 3).bfloat16(), torch.randint(50_000, (2, 4))
    found = token_log_probs(logits, tokens)
    assert found.dtype == torch.float32
    exact = torch.log_softmax(logits.double(), dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
    exact_entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(entropy(logits).double(), exact_entropy, atol=1e-4, rtol=0)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4]]])
    assert token_log_probs(logits, torch.tensor([[0]])).item() == 0.0
    assert token_log_probs(logits, torch.tensor([[2]])).item() == -2e4
    assert entropy(logits).item() == 0.0


def test_next_token_loss_predicts_each_learnt_token_from_those_before_it() -> None:
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[True, True, False, True, True], [False, False, True, True, False]])
    expected = 0.0
    for row in range(2):
        for t in range(1, 5):
            if mask[row, t]:
                expected -= torch.log_softmax(logits[row, t - 1], dim=0)[ids[row, t]].item()
    assert next_token_loss_sum(logits, ids, mask).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_not_learnt_has_no_part_in_the_loss_or_its_gradient() -> None:
    logits, ids = torch.randn(1, 5, 7), torch.tensor([[3, 1, 4, 1, 5]])
    mask = torch.tensor([[True, True, True, False, False]])
    expected = next_token_loss_sum(logits, ids, mask)
    soiled, other_ids = logits.clone(), ids.clone()
    soiled[:, 2:] = torch.nan
    other_ids[:, 3:] = 6
    assert next_token_loss_sum(soiled, other_ids, mask) == expected

    logits.requires_grad_()
    next_token_loss_sum(logits, ids, mask).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :2] != 0).any(dim=-1).all()
    assert (logits.grad[:, 2:] == 0).all()


def test_the_loss_of_a_batch_is_the_sum_over_its_micro_batches() -> None:
    logits, ids, mask = torch.randn(6, 9, 11), torch.randint(11, (6, 9)), torch.rand(6, 9) < 0.6
    whole = next_token_loss_sum(logits, ids, mask)
    for size in (1, 2, 3):
        parts = zip(logits.split(size), ids.split(size), mask.split(size), strict=True)
        torch.testing.assert_close(torch.stack([next_token_loss_sum(*part) for part in parts]).sum(), whole)


def test_entropy_of_known_distributions() -> None:
    even = torch.zeros(1, 1, 8)
    assert entropy(even).item() == pytest.approx(math.log(8))
    skewed = torch.tensor([[[math.log(0.5), math.log(0.25), math.log(0.25)]]])
    assert entropy(skewed).item() == pytest.approx(1.5 * math.log(2))
    # At temperature 1/2 the probabilities are squared and normalised: 2/3, 1/6, 1/6.
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 6))
    assert entropy(skewed, temperature=0.5).item() == pytest.approx(expected)
