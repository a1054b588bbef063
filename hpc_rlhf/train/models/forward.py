"""Forward passes of transformers models over packed sequences, or over padded rows.

Packed, the layers see one row of real tokens, so nothing is spent on padding, and attention runs sequence by
sequence. An architecture that ``packed_attention`` does not support runs on rows padded on the right instead.
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


def _padding(tokens: int, device: torch.device) -> tuple[int, ...]:
    """Lengths of unused sequences that round a packed row up to a size that matrix kernels handle well.

    A CPU compiles and keeps a kernel of about 0.8 MiB for every size, so there its rows have one of eight
    sizes between a power of two and the next.
    """
    step = ALIGNED
    if device.type == "cpu":
        step = max(step, 1 << max(0, tokens.bit_length() - 4))
    whole, rest = divmod(-tokens % step, ALIGNED)
    return (ALIGNED,) * whole + ((rest,) if rest else ())


def padded(model: Any, ids: Tensor, lengths: tuple[int, ...]) -> tuple[Any, Tensor]:
    """A forward pass over right-padded rows, with position ids if the architecture takes them.

    Args:
        ids: (tokens,), int64; packed sequences.
        lengths: tokens of each sequence.

    Returns:
        transformers' output, and (batch, longest), bool, True on real tokens.
    """
    rows, real = ragged.pad(ids, lengths), ragged.mask(lengths, ids.device)
    positions = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions["position_ids"] = torch.arange(rows.shape[1], device=ids.device).expand_as(rows)
    return model(input_ids=rows, attention_mask=real.long(), use_cache=False, **positions), real


def hidden_states(body: Any, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The last hidden states of packed sequences.

    Args:
        body: a transformers model without its head.
        ids: (tokens,), int64.
        lengths: tokens of each sequence.

    Returns:
        (tokens or more, hidden); rows after those of the sequences are padding.
    """
    if body.config._attn_implementation == packed_attention.NAME:
        # transformers passes a four-dimensional mask on as it is, instead of building one.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        padding = _padding(len(ids), ids.device)
        padded_ids, sizes = F.pad(ids, (0, sum(padding))), (*lengths, *padding)
        positions = ragged.positions(sizes, ids.device)
        output = body(
            input_ids=padded_ids.unsqueeze(0), attention_mask=unused, position_ids=positions.unsqueeze(0),
            use_cache=False, packed_lengths=sizes,
        )  # fmt: skip
        packed_hidden: Tensor = output.last_hidden_state[0]
        return packed_hidden
    output, real = padded(body, ids, lengths)
    hidden: Tensor = output.last_hidden_state[real]
    return hidden
