"""Drawing a token from logits, as a pure function of the logits and of one uniform number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_rlhf.train import seeds


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        greedy: take the likeliest token, whatever the rest says.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


def uniforms(seed_parts: list[tuple[object, ...]], length: int) -> Tensor:
    """The numbers that the answers of a batch are drawn with, each row from a seed of its own.

    A prompt's answer so depends on its seed and on the model, not on the batch it stands in.

    Args:
        seed_parts: what seeds each row.
        length: numbers in a row.

    Returns:
        (batch, length), float64, in [0, 1).
    """
    rows = torch.empty(len(seed_parts), length, dtype=torch.float64)
    for row, parts in zip(rows, seed_parts, strict=True):
        torch.rand(length, generator=torch.Generator().manual_seed(seeds.derive(*parts)), out=row)
    return rows


def draw(logits: Tensor, uniform: Tensor | None, temperature: float, top_p: float, top_k: int) -> Tensor:
    """A token for each row: the likeliest, or one drawn by inverting the cumulative distribution.

    Args:
        logits: (batch, vocabulary).
        uniform: (batch,), in [0, 1); None takes the likeliest token.
        temperature: divides the logits.
        top_p: keeps the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: keeps the k likeliest tokens; 0 keeps all.

    Returns:
        (batch,), int64.
    """
    if uniform is None:
        return logits.argmax(dim=-1)
    probabilities, tokens = torch.softmax(logits.float() / temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    if top_k:
        probabilities[:, top_k:] = 0
    cumulative = probabilities.double().cumsum(dim=-1)
    if top_p < 1:
        # A token stays if those before it do not reach top_p yet.
        probabilities[(cumulative - probabilities.double()) >= top_p * cumulative[:, -1:]] = 0
        cumulative = probabilities.double().cumsum(dim=-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put the target on the end of the distribution: the last kept token then.
    kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, kept)).squeeze(1)
