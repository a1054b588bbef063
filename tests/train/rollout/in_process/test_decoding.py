"""Drawing tokens: the right distribution and the right set, from nothing but the row's own seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train.rollout.in_process.decoding import draw, uniforms

DRAWS = 20_000
# 99.9 % points of the chi-square distribution by degrees of freedom.
CHI_SQUARE = {5: 20.52}
JUST_BELOW_ONE = 1 - 2**-53
LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, -0.4])


def drawn(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """How often each token comes in DRAWS draws."""
    uniform = uniforms([("draws",)], DRAWS)[0]
    tokens = draw(logits.expand(DRAWS, -1), uniform, temperature, top_p, top_k)
    return torch.bincount(tokens, minlength=len(logits))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * DRAWS
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_tokens_are_drawn_with_their_probability(temperature: float) -> None:
    probabilities = torch.softmax(LOGITS / temperature, dim=0)
    assert chi_square(drawn(LOGITS, temperature), probabilities) < CHI_SQUARE[5]


def test_the_distribution_test_detects_a_wrong_temperature() -> None:
    assert chi_square(drawn(LOGITS, 1.1), torch.softmax(LOGITS, dim=0)) > CHI_SQUARE[5]


@pytest.mark.parametrize("top_k", range(1, 8))
def test_top_k_keeps_exactly_the_k_likeliest(top_k: int) -> None:
    counts = drawn(LOGITS, top_k=top_k)
    likeliest = LOGITS.argsort(descending=True)[:top_k]
    assert set(counts.nonzero().flatten().tolist()) == set(likeliest.tolist())
    kept = torch.softmax(LOGITS[likeliest], dim=0)
    assert torch.allclose(counts[likeliest] / DRAWS, kept, atol=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2}), (0.9, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})],  # noqa: E501
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    counts = drawn(probabilities.log(), top_p=top_p)
    assert set(counts.nonzero().flatten().tolist()) == kept


def test_top_p_applies_after_top_k() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Of the two kept, the likelier has 4/7 = 0.571 of the probability.
    assert drawn(probabilities.log(), top_k=2, top_p=0.57).nonzero().flatten().tolist() == [0]
    assert drawn(probabilities.log(), top_k=2, top_p=0.58).nonzero().flatten().tolist() == [0, 1]


def plain_draw(logits: Tensor, uniform: float, top_p: float, top_k: int) -> int:
    """The definition for one row, token by token."""
    probabilities = torch.softmax(logits.double(), dim=0).tolist()
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    order = order[: top_k or None]
    whole, kept = sum(probabilities[token] for token in order), []
    for token in order:
        if sum(probabilities[one] for one in kept) >= top_p * whole:
            break
        kept.append(token)
    target, below = uniform * sum(probabilities[token] for token in kept), 0.0
    for token in kept:
        below += probabilities[token]
        if below > target:
            return token
    return kept[-1]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (0.5, 0), (0.99, 700), (1.0, 20)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])  # flat, where a nucleus holds most of the vocabulary, to steep
def test_truncated_distributions_match_their_definition(top_p: float, top_k: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 1500, generator=generator) * spread
    uniform = torch.rand(6, generator=generator, dtype=torch.float64)
    expected = [plain_draw(*row, top_p, top_k) for row in zip(logits, uniform.tolist(), strict=True)]
    assert draw(logits, uniform, 1.0, top_p, top_k).tolist() == expected


def test_ties_do_not_make_a_row_depend_on_its_batch() -> None:
    """Half precision has many ties; a flat row in the batch makes the code look at the whole vocabulary."""
    generator = torch.Generator().manual_seed(5)
    steep = (torch.randn(20, 3000, generator=generator) * 3).bfloat16()
    uniform = torch.rand(21, generator=generator, dtype=torch.float64)
    alone = draw(steep, uniform[:20], 1.0, 0.9, 0)
    together = draw(torch.cat([steep, torch.zeros(1, 3000).bfloat16()]), uniform, 1.0, 0.9, 0)
    assert torch.equal(together[:20], alone)


def test_without_a_uniform_the_likeliest_token_is_taken() -> None:
    logits = torch.randn(9, 30)
    assert torch.equal(draw(logits, None, 0.3, 0.1, 2), logits.argmax(dim=-1))


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 3), (0.7, 5)])
@pytest.mark.parametrize("uniform", [0.0, JUST_BELOW_ONE, 1.0])  # 1: a parallel sum may round differently
def test_the_ends_of_the_unit_interval_give_kept_tokens(uniform: float, top_p: float, top_k: int) -> None:
    for seed in range(20):
        logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(seed)) * 5
        logits[:, 100:] = -torch.inf  # the last tokens of the order are impossible
        tokens = draw(logits, torch.full((4,), uniform, dtype=torch.float64), 1.0, top_p, top_k)
        cut = top_k or top_p < 1
        order = logits.argsort(dim=-1, descending=True, stable=True) if cut else torch.arange(5000).expand(4, -1)
        place = (order == tokens.unsqueeze(1)).long().argmax(dim=1)
        assert (logits.gather(1, tokens.unsqueeze(1)) > -torch.inf).all()
        assert (place == 0).all() if uniform == 0 else (place < (top_k or 100)).all()


def test_each_token_has_a_half_open_part_of_the_unit_interval() -> None:
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, JUST_BELOW_ONE], dtype=torch.float64)
    assert draw(torch.zeros(5, 4), uniform, 1.0, 1.0, 0).tolist() == [0, 1, 2, 3, 3]


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, uniform = torch.randn(16, 50), uniforms([("row", i) for i in range(16)], 1)[:, 0]
    together = draw(logits, uniform, 1.0, 0.9, 20)
    alone = [draw(logits[i : i + 1], uniform[i : i + 1], 1.0, 0.9, 20).item() for i in range(16)]
    assert together.tolist() == alone
    assert len(set(alone)) > 5


def test_uniforms_are_a_pure_function_of_their_keys() -> None:
    first = uniforms([(7, "rollout", 3), (7, "rollout", 4)], 6)
    torch.manual_seed(99)
    torch.rand(5)
    again = uniforms([(7, "rollout", 4), (8, "rollout", 4), (7, "rollout", 3)], 9)
    assert torch.equal(first[0], again[2, :6])
    assert torch.equal(first[1], again[0, :6])
    assert not torch.equal(again[0], again[1])
    assert first.dtype == torch.float64
    assert ((first >= 0) & (first < 1)).all()


def test_uniforms_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    uniforms([("a",)], 10)
    assert torch.equal(torch.rand(4), expected)
