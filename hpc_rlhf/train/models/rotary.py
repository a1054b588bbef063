"""Rotary embeddings whose frequencies depend on the length of a sequence: longrope and dynamic NTK scaling.

transformers picks one set of frequencies per pass, for its longest sequence, and may keep it for the next pass. Here
each sequence gets the frequencies that it would have alone in a freshly loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec import model_files

SWITCHING = ("dynamic", "longrope")


def switch_length(config: Any) -> int | None:
    """The tokens up to which all sequences have the same rotary frequencies; None if all have, whatever their length.

    Args:
        config: of a transformers model.
    """
    return model_files.rotary_switch(vars(config.get_text_config()))


def check_rollouts(config: Any, longest: int, source: str) -> None:
    """Refuse to learn from sampled sequences over which the frequencies switch.

    ``check`` refuses them as well if the model's files are on its machine.
    """
    limit = switch_length(config)
    if limit is not None and longest > limit:
        what, hint = model_files.switches_within(limit, longest)
        raise HpcRlhfError(f"the model: {what}", where=source, hint=hint)


def separate(model: nn.Module) -> None:
    """Make each sequence's rotary frequencies independent of the others of its pass and of earlier passes, in place.

    Sequences are recognized by their positions, which start at 0 or continue one that is cached.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(switching in str(name) for name in names for switching in SWITCHING):
            limit = switch_length(module.config)
            if limit is not None and "forward" not in vars(module):
                vars(module)["forward"] = _Separate(module, limit)


class _Separate:
    """The forward pass of a rotary embedding, sequence by sequence where they differ."""

    def __init__(self, module: Any, limit: int) -> None:
        self.module = module
        self.limit = limit

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        _reset(self.module)
        if position_ids.device.type == "meta" or int(position_ids.max()) < self.limit:
            return forward(self.module, x, position_ids, *args, **kwargs)
        whole: Any = None
        for chosen in _classes(position_ids, self.limit):
            _reset(self.module)
            # Frequencies follow from the largest position.
            own = forward(self.module, x, position_ids.where(chosen, 0), *args, **kwargs)
            whole = own if whole is None else _merged(own, whole, chosen)
        return whole


def _classes(position_ids: Tensor, limit: int) -> Iterator[Tensor]:
    """Masks (batch, tokens) of the sequences up to the limit, and then of those of each greater length."""
    lengths = _lengths(position_ids)
    for length in lengths.clamp(min=limit).unique().tolist():
        yield lengths <= limit if length == limit else lengths == length


def _lengths(position_ids: Tensor) -> Tensor:
    """For each token, the length of its sequence up to its last token here: (batch, tokens), int64."""
    begins = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    runs = begins.flatten().cumsum(0) - 1
    ends = position_ids.new_zeros(int(runs[-1]) + 1).scatter_reduce_(0, runs, position_ids.flatten() + 1, "amax")
    return ends[runs].view_as(position_ids)


def _merged(own: Any, whole: Any, chosen: Tensor) -> Any:
    if isinstance(own, tuple):
        return tuple(_merged(mine, others, chosen) for mine, others in zip(own, whole, strict=True))
    return torch.where(chosen.view(*chosen.shape, *[1] * (own.dim() - 2)), own, whole)


def _reset(module: Any) -> None:
    """Forget the frequencies of earlier passes, which dynamic scaling keeps."""
    kinds = module.rope_type
    for prefix, kind in (
        [(f"{name}_", kind) for name, kind in kinds.items()] if isinstance(kinds, dict) else [("", kinds)]
    ):
        if "dynamic" not in str(kind):
            continue
        current = getattr(module, f"{prefix}inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq").to(current.device)
        if current is not original:
            module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
        if isinstance(kinds, dict):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        else:
            module.max_seq_len_cached = module.original_max_seq_len
