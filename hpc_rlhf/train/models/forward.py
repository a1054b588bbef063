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


def padded(model: Any, ids: Tensor, lengths: tuple[int, ...]) -> tuple[Any, Tensor]:
    """A forward pass over sequences as rows padded on the right, with position ids where the architecture takes them.

    Args:
        ids: (tokens,), int64; the sequences laid end to end.
        lengths: tokens of each sequence.

    Returns:
        transformers' output, and (batch, longest), bool, True on real tokens.
    """
    rows, real = ragged.pad(ids, lengths), ragged.mask(lengths, ids.device)
    places = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        places["position_ids"] = torch.arange(rows.shape[1], device=ids.device).expand_as(rows)
    return model(input_ids=rows, attention_mask=real.long(), use_cache=False, **places), real


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
        packed_hidden: Tensor = output.last_hidden_state[0, : len(ids)]
        return packed_hidden
    output, real = padded(body, ids, lengths)
    hidden: Tensor = output.last_hidden_state[real]
    return hidden
