"""Forward passes of transformers models: over padded rows, and over sequences laid end to end.

Laid end to end, the layers see one row of real tokens, so padding costs nothing, and attention goes sequence by
sequence. An architecture whose attention is not that of ``packed`` runs on rows padded on the right instead.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_rlhf.train import ragged
from hpc_rlhf.train.models import packed

# Rows of so many tokens are a multiple of so many, by one more sequence at the end that nothing looks at: matrix
# kernels are made anew for every height, and are fastest at even ones.
ALIGNED = 64


def call(model: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
    """A forward pass with position ids, for architectures that take them.

    Args:
        input_ids, attention_mask, position_ids: (batch, length); positions come from ``positions``.
    """
    module = getattr(model, "module", model)
    if "position_ids" in inspect.signature(module.forward).parameters:
        kwargs["position_ids"] = position_ids
    kwargs.setdefault("use_cache", False)
    return model(input_ids=input_ids, attention_mask=attention_mask.long(), **kwargs)


def positions(mask: Tensor) -> Tensor:
    """Position ids that count real tokens, so that padding on the left changes nothing.

    Args:
        mask: (batch, length), bool; True on real tokens.

    Returns:
        (batch, length), int64; 0 on padding at the left.
    """
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def hidden_states(body: Any, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The last hidden states of sequences laid end to end.

    Args:
        body: a transformers model without its head.
        ids: (tokens,), int64.
        lengths: tokens of each sequence.

    Returns:
        (tokens, hidden).
    """
    if body.config._attn_implementation == packed.NAME:
        # transformers hands a mask of four dimensions on as it is, and so builds none of its own.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        spare = -len(ids) % ALIGNED
        filled, sizes = (F.pad(ids, (0, spare)), (*lengths, spare)) if spare else (ids, lengths)
        places = ragged.positions(sizes, ids.device)
        output = body(
            input_ids=filled.unsqueeze(0), attention_mask=unused, position_ids=places.unsqueeze(0),
            use_cache=False, packed_lengths=sizes,
        )  # fmt: skip
        hidden: Tensor = output.last_hidden_state[0]
        return hidden[: len(ids)]
    real = ragged.mask(lengths, ids.device)
    padded = ragged.pad(ids, lengths)
    places = torch.arange(padded.shape[1], device=ids.device).expand_as(padded)
    hidden = call(body, padded, real, places).last_hidden_state
    return hidden[real]
