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

from hpc_rlhf.spec.sizes import ALIGNED
from hpc_rlhf.train import ragged
from hpc_rlhf.train.models import packed_attention


def _filling(tokens: int, device: torch.device) -> tuple[int, ...]:
    """Lengths of sequences that nothing looks at, which give a row of tokens an even height.

    A CPU's matrix kernels are made anew for every height and kept, each some 0.8 MiB: its rows have one of eight heights
    between a power of two and the next.
    """
    step = ALIGNED
    if device.type == "cpu":
        step = max(step, 1 << max(0, tokens.bit_length() - 4))
    whole, rest = divmod(-tokens % step, ALIGNED)
    return (ALIGNED,) * whole + ((rest,) if rest else ())


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
        (tokens or more, hidden); rows after those of the sequences mean nothing.
    """
    if body.config._attn_implementation == packed_attention.NAME:
        # transformers hands a mask of four dimensions on as it is, and so builds none of its own.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        filling = _filling(len(ids), ids.device)
        filled, sizes = F.pad(ids, (0, sum(filling))), (*lengths, *filling)
        places = ragged.positions(sizes, ids.device)
        output = body(
            input_ids=filled.unsqueeze(0), attention_mask=unused, position_ids=places.unsqueeze(0),
            use_cache=False, packed_lengths=sizes,
        )  # fmt: skip
        packed_hidden: Tensor = output.last_hidden_state[0]
        return packed_hidden
    output, real = padded(body, ids, lengths)
    hidden: Tensor = output.last_hidden_state[real]
    return hidden
