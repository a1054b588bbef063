"""The reward model's pairwise losses and scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def last_positions(mask: Tensor) -> Tensor:
    """Index of the last real token of each row.

    Args:
        mask: (batch, length), bool; True on real tokens, at least one per row.

    Returns:
        (batch,), int64.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def score(values: Tensor, mask: Tensor) -> Tensor:
    """A sequence's score: the value of its last real token.

    Args:
        values: (batch, length), the reward head's output.
        mask: (batch, length), bool; True on real tokens.

    Returns:
        (batch,).
    """
    return values.gather(1, last_positions(mask).unsqueeze(1)).squeeze(1)


def preferred(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 where ours is higher, 0.5 where both are equal, otherwise 0; in the shape of both, float32."""
    return (ours > theirs).float() + 0.5 * (ours == theirs).float()


def ranking_loss(chosen: Tensor, rejected: Tensor, margins: Tensor | None = None) -> Tensor:
    """The loss of a Bradley-Terry model of scores of whole responses (InstructGPT, arXiv 2203.02155, equation 1).

    ``-logsigmoid(chosen - rejected - margin)``, with a margin as in Llama 2 (arXiv 2307.09288, equation 2).

    Args:
        chosen, rejected: (pairs,), float32; scores.
        margins: (pairs,), float32; None for no margins.

    Returns:
        (pairs,).
    """
    difference = chosen - rejected
    return -F.logsigmoid(difference if margins is None else difference - margins)


def pairwise_loss(
    chosen_values: Tensor, rejected_values: Tensor, chosen_ids: Tensor, rejected_ids: Tensor,
    chosen_mask: Tensor, rejected_mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The token-wise ranking loss of DeepSpeed-Chat (arXiv 2308.01320, step 2).

    Each pair's loss is the mean of ``-logsigmoid(chosen - rejected)`` over the positions from the first token
    at which the sequences differ to the end of the longer one. After its end, the shorter sequence keeps the
    value of its last real token, so padding is ignored. Rows are padded on the right.

    Args:
        chosen_values, rejected_values: (batch, length), float.
        chosen_ids, rejected_ids: (batch, length), int64.
        chosen_mask, rejected_mask: (batch, length), bool; True on real tokens.

    Returns:
        The loss of each pair, and the scores of the chosen and the rejected sequences: (batch,) each. A pair
        of equal sequences has a loss of 0 and no gradient.
    """
    positions = torch.arange(chosen_ids.shape[1], device=chosen_ids.device).unsqueeze(0)
    chosen_last, rejected_last = last_positions(chosen_mask), last_positions(rejected_mask)
    differ = (chosen_ids != rejected_ids) | (chosen_mask != rejected_mask)
    first = torch.where(differ, positions, chosen_ids.shape[1]).amin(dim=1, keepdim=True)
    last = torch.maximum(chosen_last, rejected_last).unsqueeze(1)
    compared = (positions >= first) & (positions <= last)

    held_chosen = chosen_values.gather(1, torch.minimum(positions, chosen_last.unsqueeze(1)))
    held_rejected = rejected_values.gather(1, torch.minimum(positions, rejected_last.unsqueeze(1)))
    losses = -F.logsigmoid((held_chosen - held_rejected).float()) * compared
    pair_losses = losses.sum(dim=1) / compared.sum(dim=1).clamp(min=1)
    return (pair_losses, score(chosen_values, chosen_mask).float(), score(rejected_values, rejected_mask).float())
