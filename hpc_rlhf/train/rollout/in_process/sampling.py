"""Drawing a token from logits, as a pure function of the logits and one uniform number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_rlhf.train.runtime import seeds

# The largest fraction whose product with a sum does not round up to the sum.
LARGEST_FRACTION = 1 - 2**-52

# Number of likeliest tokens to try for top_p before sorting all.
NUCLEUS = 512


def uniforms(keys: Sequence[tuple[object, ...]], length: int) -> Tensor:
    """The numbers that a batch's responses are drawn with, each row from its own seed.

    So a response depends on its key and on the model, not on the batch that its prompt is in.

    Args:
        keys: what seeds each row.

    Returns:
        (batch, length), float64, in [0, 1).
    """
    rows = torch.empty(len(keys), length, dtype=torch.float64)
    for row, key in zip(rows, keys, strict=True):
        torch.rand(length, generator=torch.Generator().manual_seed(seeds.derive(*key)), out=row)
    return rows


def draw(logits: Tensor, uniform: Tensor | None, temperature: float, top_p: float, top_k: int) -> Tensor:
    """A token for each row: the likeliest, or one drawn by inverting the cumulative distribution.

    Args:
        logits: (batch, vocabulary).
        uniform: (batch,), in [0, 1); None takes the likeliest token.
        temperature, top_p, top_k: as in ``Sampling``.

    Returns:
        (batch,), int64.
    """
    if uniform is None:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() if temperature == 1 else logits.float() / temperature, dim=-1)
    if not top_k and top_p >= 1:
        return _invert(probabilities, uniform).squeeze(1)
    likeliest, tokens = _likeliest(probabilities, top_p, top_k)
    return tokens.gather(1, _invert(likeliest, uniform)).squeeze(1)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Where each row's cumulative distribution first exceeds a fraction of its sum: (batch, 1), int64.

    Args:
        probabilities: (batch, n), up to a factor.
        uniform: (batch,), the fractions; 1 gives the last possible token.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    fractions = uniform.clamp(max=LARGEST_FRACTION).unsqueeze(1)
    return torch.searchsorted(cumulative, fractions * cumulative[:, -1:], right=True)


def _likeliest(probabilities: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, ties in vocabulary order.

    Returns:
        Probabilities (batch, n), 0 where a token is not kept, and tokens (batch, n).
    """
    likeliest, tokens = probabilities.topk(min(top_k or NUCLEUS, probabilities.shape[1]), dim=-1)
    total = (likeliest if top_k else probabilities).sum(dim=-1, keepdim=True, dtype=torch.float64)
    # More tokens may tie with the last one found.
    certain = likeliest.double().where(likeliest > likeliest[:, -1:], 0.0).sum(dim=-1, keepdim=True)
    if top_k or bool((certain > (top_p + 1e-6) * total).all()):
        tokens, order = tokens.sort(dim=-1)
        likeliest, order = likeliest.gather(1, order).sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(1, order)
    else:
        likeliest, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        # A token stays if those before it do not reach top_p.
        before = likeliest.cumsum(dim=-1, dtype=torch.float64) - likeliest.double()
        likeliest = likeliest.where(before < top_p * total, 0.0)
    return likeliest, tokens
