"""Scores and the pairwise loss compared with plain loops; padding never takes part."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.reward import last_positions, pairwise_loss, preferred, ranking_loss, score
from hpc_rlhf.train.ragged import Ragged

EOS = 2


def by_hand(chosen: list[float], rejected: list[float], chosen_ids: list[int], rejected_ids: list[int]) -> float:
    """One pair's loss from its real tokens only."""
    if chosen_ids == rejected_ids:
        return 0.0
    shorter = min(len(chosen_ids), len(rejected_ids))
    first = next((t for t in range(shorter) if chosen_ids[t] != rejected_ids[t]), shorter)
    terms = []
    for t in range(first, max(len(chosen_ids), len(rejected_ids))):
        margin = chosen[min(t, len(chosen) - 1)] - rejected[min(t, len(rejected) - 1)]
        terms.append(math.log1p(math.exp(-margin)))
    return sum(terms) / len(terms)


def padded(chosen: list[list[int]], rejected: list[list[int]], pad_id: int) -> tuple[Tensor, ...]:
    """Ids and masks of chosen and rejected, of one length."""
    rows = chosen + rejected
    mask = ragged.mask([len(row) for row in rows], torch.device("cpu"))
    ids = torch.full(mask.shape, pad_id).masked_scatter(mask, Ragged.of(rows).ids)
    return (*ids.chunk(2), *mask.chunk(2))


PAIRS: dict[str, tuple[list[int], list[int]]] = {
    "equal length": ([5, 6, 7, 8, EOS], [5, 6, 9, 8, EOS]),
    "chosen longer": ([5, 6, 7, 8, 9, EOS], [5, 4, EOS]),
    "rejected longer": ([5, 4, EOS], [5, 6, 7, 8, 9, EOS]),
    "different from the start": ([3, 4], [5, 6, 7]),
    "chosen is the beginning of rejected": ([5, 6], [5, 6, 7]),
    "rejected ends where chosen goes on": ([5, EOS, 7], [5, EOS]),
    "rejected is chosen with its eos": ([5, 6], [5, 6, EOS]),
    "equal": ([5, 6, EOS], [5, 6, EOS]),
    "one token": ([5], [6]),
}


@pytest.mark.parametrize("pad_id", [0, EOS], ids=["pad", "pad is eos"])
def test_losses_match_a_plain_loop(pad_id: int) -> None:
    chosen, rejected = [c for c, _ in PAIRS.values()], [r for _, r in PAIRS.values()]
    chosen_ids, rejected_ids, chosen_mask, rejected_mask = padded(chosen, rejected, pad_id)
    chosen_values, rejected_values = torch.randn(chosen_ids.shape), torch.randn(chosen_ids.shape)
    losses, chosen_scores, rejected_scores = pairwise_loss(
        chosen_values, rejected_values, chosen_ids, rejected_ids, chosen_mask, rejected_mask
    )
    for row, name in enumerate(PAIRS):
        c, r = chosen[row], rejected[row]
        c_values, r_values = chosen_values[row, : len(c)].tolist(), rejected_values[row, : len(r)].tolist()
        assert losses[row].item() == pytest.approx(by_hand(c_values, r_values, c, r), rel=1e-5), name
        assert chosen_scores[row].item() == pytest.approx(c_values[-1]), name
        assert rejected_scores[row].item() == pytest.approx(r_values[-1]), name


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("junk", [1e30, torch.nan])
def test_padding_never_matters(name: str, junk: float) -> None:
    chosen, rejected = PAIRS[name]
    ids_and_masks = padded([chosen], [rejected], 0)
    values = [torch.randn(ids_and_masks[0].shape, requires_grad=True) for _ in range(2)]
    loss = pairwise_loss(*values, *ids_and_masks)[0]  # type: ignore[call-arg, arg-type]

    wide = max(len(chosen), len(rejected)) + 3
    soiled: list[Any] = []
    for mine, ids in zip(values, (chosen, rejected), strict=True):
        soiled.append(torch.full((1, wide), junk))
        soiled[-1][:, : len(ids)] = mine.detach()[:, : len(ids)]
    masks = [torch.arange(wide).unsqueeze(0) < len(ids) for ids in (chosen, rejected)]
    all_ids = [torch.tensor([ids + [90 + side] * (wide - len(ids))]) for side, ids in enumerate((chosen, rejected))]
    again = pairwise_loss(*soiled, *all_ids, *masks)[0]  # type: ignore[call-arg]
    assert torch.equal(loss, again)

    loss.sum().backward()
    for mine, ids in zip(values, (chosen, rejected), strict=True):
        assert mine.grad is not None
        assert (mine.grad[:, len(ids) :] == 0).all()
        assert bool((mine.grad != 0).any()) == (chosen != rejected)


def test_the_shared_prefix_gets_no_gradient() -> None:
    ids_and_masks = padded([[5, 6, 7, EOS]], [[5, 6, 8, 9, EOS]], 0)
    chosen_values = torch.randn(1, 5, requires_grad=True)
    pairwise_loss(chosen_values, torch.randn(1, 5), *ids_and_masks)[0].sum().backward()  # type: ignore[call-arg, arg-type]
    assert chosen_values.grad is not None
    assert (chosen_values.grad[0] != 0).tolist() == [False, False, True, True, False]


def test_a_tie_counts_half() -> None:
    ours, theirs = torch.tensor([2.0, 1.0, 1.0, -3.0]), torch.tensor([1.0, 2.0, 1.0, -3.0])
    assert preferred(ours, theirs).tolist() == [1, 0, 0.5, 0.5]


def test_the_ranking_loss_and_its_gradient_match_the_paper() -> None:
    chosen, rejected = torch.tensor([1.5, -40.0, 0.0], requires_grad=True), torch.tensor([0.5, 60.0, 0.0])
    losses = ranking_loss(chosen, rejected)
    losses.sum().backward()
    assert chosen.grad is not None
    for row, difference in enumerate((1.0, -100.0, 0.0)):
        probability = 1 / (1 + math.exp(-difference))
        assert losses[row].item() == pytest.approx(-math.log(probability), rel=1e-5)
        assert chosen.grad[row].item() == pytest.approx(probability - 1, rel=1e-5)


@pytest.mark.parametrize("pad_id", [0, EOS], ids=["pad", "pad is eos"])
def test_the_score_is_the_last_real_tokens_value(pad_id: int) -> None:
    rows = [[5, 6, EOS], [5, EOS], [5, 6, 7, 8], [9, 9, 9, EOS]]
    _, _, *masks = padded(rows[:2], rows[2:], pad_id)
    values = torch.arange(16.0).reshape(4, 4)
    assert score(values, torch.cat(masks)).tolist() == [2.0, 5.0, 11.0, 15.0]


def test_the_last_real_token_is_found_with_padding_on_either_side() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    assert last_positions(mask).tolist() == [3, 4, 0]


@pytest.mark.parametrize("margins", [[0.0, 0.0, 0.0], [1.0, 0.5, 2 / 3], [3.0, -1.0, 10.0]])
def test_margins_are_those_of_llama_2(margins: list[float]) -> None:
    """Equation 2 of arXiv 2307.09288, and its gradient: minus the probability of the other order."""
    chosen, rejected = torch.tensor([2.0, 0.1, -3.0], requires_grad=True), torch.tensor([1.0, 0.4, 2.0])
    losses = ranking_loss(chosen, rejected, torch.tensor(margins))
    differences = [c - r - m for c, r, m in zip(chosen.tolist(), rejected.tolist(), margins, strict=True)]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-d)) for d in differences], rel=1e-5)
    losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(d)) for d in differences], rel=1e-5)
    if not any(margins):
        assert torch.equal(losses, ranking_loss(chosen, rejected))
