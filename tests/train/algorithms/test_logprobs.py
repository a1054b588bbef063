"""Log-probabilities and entropy compared with sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_rlhf.train.algorithms import logprobs
from hpc_rlhf.train.algorithms.logprobs import entropy, head_log_prob_sum, head_log_probs, token_log_probs


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_token_log_probs_are_the_log_of_the_softmax_at_the_temperature(temperature: float) -> None:
    logits, tokens = torch.randn(2, 3, 5) * 4, torch.randint(5, (2, 3))
    actual = token_log_probs(logits, tokens, temperature)
    for row in range(2):
        for t in range(3):
            weights = [math.exp(x / temperature) for x in logits[row, t].tolist()]
            expected = math.log(weights[tokens[row, t]] / sum(weights))
            assert actual[row, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_bfloat16_logits_are_normalized_in_float32() -> None:
    logits, tokens = (torch.randn(2, 4, 50_000) * 3).bfloat16(), torch.randint(50_000, (2, 4))
    actual = token_log_probs(logits, tokens)
    assert actual.dtype == torch.float32
    exact = torch.log_softmax(logits.double(), dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(actual.double(), exact, atol=1e-5, rtol=0)
    exact_entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(entropy(logits).double(), exact_entropy, atol=1e-4, rtol=0)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4]]])
    assert token_log_probs(logits, torch.tensor([[0]])).item() == 0.0
    assert token_log_probs(logits, torch.tensor([[2]])).item() == -2e4
    assert entropy(logits).item() == 0.0


@pytest.mark.parametrize(("chunk", "aligned"), [(1, 1), (3, 3), (128, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_head_log_probs_match_those_from_logits_with_gradients(
    chunk: int, aligned: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the last chunk is padded."""
    monkeypatch.setattr(logprobs, "ALIGNED", aligned)
    monkeypatch.setattr(logprobs, "head_rows", lambda *_: chunk)
    hidden, weight, bias = torch.randn(8, 5), torch.randn(11, 5), torch.randn(11) if with_bias else None
    tokens, temperature, weights = torch.randint(11, (8,)), 0.6, torch.randn(8)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    actual, entropies = head_log_probs(hidden, weight, bias, tokens, temperature, True)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = token_log_probs(logits, tokens, temperature)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(entropies, entropy(logits, temperature).detach())
    ours = torch.autograd.grad((actual * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("chunk", "aligned"), [(1, 1), (3, 3), (128, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_sum_computes_gradients_in_its_forward_pass(
    chunk: int, aligned: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "ALIGNED", aligned)
    monkeypatch.setattr(logprobs, "head_rows", lambda *_: chunk)
    hidden, weight = torch.randn(8, 5).double(), torch.randn(11, 5).double()
    bias = torch.randn(11).double() if with_bias else None
    tokens, temperature = torch.randint(11, (8,)), 0.6
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    actual = head_log_prob_sum(hidden, weight, bias, tokens, temperature)
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    expected = logits.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).sum()
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-6)
    # What is computed from the sum afterwards scales the gradients, in every backward pass.
    for factor in (1.0, -0.3):
        ours = torch.autograd.grad(actual * factor, leaves, retain_graph=True)
        theirs = torch.autograd.grad(expected * factor, leaves, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_the_sums_gradients_match_those_of_its_terms(dtype: torch.dtype, frozen: tuple[int, ...]) -> None:
    """Also for gradients so small that float16 needs its loss scale, and with part of the model frozen."""
    originals = [(torch.randn(200, 16)).to(dtype), torch.randn(4096, 16).to(dtype)]
    tokens, grads, values = torch.randint(4096, (200,)), [], []
    for summed in (False, True):
        hidden, weight = (x.clone().requires_grad_(i not in frozen) for i, x in enumerate(originals))
        if summed:
            value = head_log_prob_sum(hidden, weight, None, tokens, 1.0)
        else:
            value = head_log_probs(hidden, weight, None, tokens, 1.0, False)[0].sum()
        (value * 512).backward()
        values.append(value)
        grads.append([x.grad for x in (hidden, weight)])
    torch.testing.assert_close(values[0], values[1])
    for number, (one, other) in enumerate(zip(*grads, strict=True)):
        assert (one is None) == (other is None) == (number in frozen)
        if one is not None:
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3 * one.abs().max().item())


def test_no_gradients_are_computed_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs._Head, "accumulate", None)
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    tokens = torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        head_log_prob_sum(hidden, weight, None, tokens, 1.0)
    head_log_prob_sum(hidden.detach(), weight.detach(), None, tokens, 1.0)


def test_the_matmul_precision_is_restored() -> None:
    """Only the head's own matrices are multiplied in bfloat16."""
    weight = torch.randn(7, 5).bfloat16().requires_grad_()
    total = head_log_prob_sum(torch.randn(4, 5).bfloat16(), weight, None, torch.tensor([1, 2, 3, 4]), 1.0)
    total.backward()
    one, other = torch.randn(64, 64), torch.randn(64, 64)
    torch.testing.assert_close((one @ other).double(), one.double() @ other.double(), atol=1e-4, rtol=1e-4)


def test_a_chunked_gradient_in_bfloat16_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, tokens = (torch.randn(512, 8).bfloat16(), torch.randn(16, 8).bfloat16(), torch.arange(512) % 16)
    grads = []
    monkeypatch.setattr(logprobs, "ALIGNED", 1)
    for rows in (512, 1):
        monkeypatch.setattr(logprobs, "head_rows", lambda *_, rows=rows: rows)
        leaf = weight.clone().requires_grad_()
        head_log_probs(hidden, leaf, None, tokens, 1.0, False)[0].sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=0.1, rtol=0.02)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5)
    head_log_probs(hidden, weight, None, torch.tensor([1, 2, 3, 4]), 1.0, False)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_the_hidden_gradient_is_skipped_if_nothing_below_is_trained() -> None:
    weight = torch.randn(7, 5, requires_grad=True)
    head_log_probs(torch.randn(4, 5), weight, None, torch.tensor([1, 2, 3, 4]), 1.0, False)[0].sum().backward()
    assert weight.grad is not None


def test_entropy_of_known_distributions() -> None:
    even = torch.zeros(1, 1, 8)
    assert entropy(even).item() == pytest.approx(math.log(8))
    skewed = torch.tensor([[[math.log(0.5), math.log(0.25), math.log(0.25)]]])
    assert entropy(skewed).item() == pytest.approx(1.5 * math.log(2))
    # At temperature 1/2 the probabilities are squared and normalized: 2/3, 1/6, 1/6.
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 6))
    assert entropy(skewed, temperature=0.5).item() == pytest.approx(expected)


def test_chunks_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    heights, multiply = set(), torch.mm

    def recorded(part: torch.Tensor, *rest: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        heights.add(len(part))
        return multiply(part, *rest, out=out)

    monkeypatch.setattr(logprobs.torch, "mm", recorded)
    monkeypatch.setattr(logprobs, "head_rows", lambda *_: 128)
    for n in range(1, 400, 7):
        head_log_probs(torch.ones(n, 2), torch.ones(4, 2), None, torch.zeros(n, dtype=torch.int64), 1.0, False)
    assert heights == {64, 128}
