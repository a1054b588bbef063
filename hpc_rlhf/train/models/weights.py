"""The whole weights of a model in training, wherever its shards lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.train.models.lora import LoraLinear


def is_sharded(parameters: list[nn.Parameter]) -> bool:
    """Whether any of the parameters is partitioned by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def gathered(parameters: list[nn.Parameter], to_change: bool = False) -> AbstractContextManager[Any]:
    """Within it, the parameters are whole on every rank. A collective operation under ZeRO-3.

    Args:
        to_change: keep what rank 0 writes into them; otherwise changes are lost.
    """
    if not is_sharded(parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if to_change else None)


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model by its Hugging Face name, whole and with adapters folded in.

    A collective operation under ZeRO-3, one module at a time: every rank must iterate to the end. A tensor
    may be a view of the parameter and is good only until the next one is asked for. Tied parameters
    come once.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, LoraLinear):
            own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
            with gathered(own), torch.no_grad():
                yield f"{prefix}.weight", module.merged_weight()
                if module.base.bias is not None:
                    yield f"{prefix}.bias", module.base.bias.detach()
            seen.update(map(id, own))
            continue
        named = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) not in seen]
        if not named:
            continue
        with gathered([parameter for _, parameter in named]):
            for name, parameter in named:
                yield f"{prefix}.{name}" if prefix else name, parameter.detach()
        seen.update(id(parameter) for _, parameter in named)


def export(model: Any, tokenizer: Any, folder: Path, is_main: bool) -> None:
    """Write a Hugging Face folder that ``from_pretrained`` loads. Collective; rank 0 writes.

    Args:
        model: the transformers model, not its DeepSpeed engine.
        folder: made if it is not there.
    """
    # A buffer may be part of the checkpoint too (GPT-NeoX's bias, for one).
    persistent = {name for name in model.state_dict() if ".base." not in name and ".lora_" not in name}
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    state = {}
    for name, tensor in full_weights(model):
        if is_main:
            state[name] = tensor.to("cpu", copy=True).contiguous()
    if is_main:
        state.update({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in buffers.items()})
        folder.mkdir(parents=True, exist_ok=True)
        _stop_at(getattr(model, "generation_config", None), tokenizer.eos_token_id)
        model.save_pretrained(str(folder), state_dict=state)
        tokenizer.save_pretrained(str(folder))


def _stop_at(generation: Any, eos_id: int) -> None:
    """Let ``generate`` end answers where training did, which need not be where the base model ended documents."""
    if generation is None:
        return
    known = generation.eos_token_id
    others = known if isinstance(known, list) else [known]
    ids = [eos_id, *(number for number in others if number not in (None, eos_id))]
    generation.eos_token_id = ids if len(ids) > 1 else eos_id
