"""Drawing a token from logits, as a pure function of the logits and of one uniform number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_rlhf.train.runtime import seeds


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


# The largest share of a whole that rounding leaves below it.
ALL_BUT_NOTHING = 1 - 2**-52

# How many of the likeliest tokens are looked at for top_p, before all are.
NUCLEUS = 512


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
    probabilities = torch.softmax(
        logits.float() if temperature == 1 else logits.float() / temperature, dim=-1
    )
    if not top_k and top_p >= 1:
        return _invert(probabilities, uniform).squeeze(1)
    likeliest, tokens = _likeliest(probabilities, top_p, top_k)
    return tokens.gather(1, _invert(likeliest, uniform)).squeeze(1)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Where each row's cumulative distribution first exceeds a share of its whole: (batch, 1), int64.

    Args:
        probabilities: (batch, n), up to a factor.
        uniform: (batch,), the shares; one at the very end gives the last that is possible.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    shares = uniform.clamp(max=ALL_BUT_NOTHING).unsqueeze(1)
    return torch.searchsorted(cumulative, shares * cumulative[:, -1:], right=True)


def _likeliest(probabilities: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, equal ones in the order of the vocabulary.

    Returns:
        Probabilities (batch, n), 0 where a token is not kept, and tokens (batch, n).
    """
    found, tokens = probabilities.topk(min(top_k or NUCLEUS, probabilities.shape[1]), dim=-1)
    whole = (found if top_k else probabilities).sum(dim=-1, keepdim=True, dtype=torch.float64)
    # Of those as likely as the last one found, others may be left.
    surely = found.double().where(found > found[:, -1:], 0.0).sum(dim=-1, keepdim=True)
    if top_k or bool((surely > (top_p + 1e-6) * whole).all()):
        tokens, order = tokens.sort(dim=-1)
        found, order = found.gather(1, order).sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(1, order)
    else:
        found, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        # A token stays if those before it do not reach top_p yet.
        before = found.cumsum(dim=-1, dtype=torch.float64) - found.double()
        found = found.where(before < top_p * whole, 0.0)
    return found, tokens
