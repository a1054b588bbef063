"""Loads a model split over tensor-parallel ranks, each of which reads only its own shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpc_rlhf.spec import model_files
from hpc_rlhf.train.models import score_head
from hpc_rlhf.train.models.vocabulary import split_model
from hpc_rlhf.train.parallel import deepspeed_internals as internals
from hpc_rlhf.train.parallel import tensor_parallel


def load(model_class: Any, config: Any, source: str, dtype: torch.dtype, ways: int) -> Any:
    """A model of transformers in eval mode, like ``model_class.from_pretrained`` and ``split_model``. Collective.

    A score head that the files do not have is 0.

    Returns:
        The model; None if its files are not here, or do not have its weights by their names and in their shapes, so
        that transformers has to convert them.

    Raises:
        HpcRlhfError: see ``split_model``.
    """
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import GenerationConfig
    from transformers.utils import logging

    # All ranks make the groups, also if some of them do not find the files.
    internals.tensor_group(ways)
    where = model_files.folder(source)
    stored = None if where is None else model_files.shapes(where)
    if where is None or stored is None or getattr(model_class, "_keep_in_fp32_modules", None):
        return None
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        model = model_class(config).eval()
    model.tie_weights()  # the meta device has untied them
    prefix, parameters = f"{model.base_model_prefix}.", dict(model.named_parameters())
    everything = dict(model.named_parameters(remove_duplicate=False))
    names = {name: name if name in stored else name.removeprefix(prefix) for name in everything}
    for name, parameter in parameters.items():
        expected = stored.get(names[name], [1, parameter.shape[-1]] if name == score_head.WEIGHT else None)
        if expected != list(parameter.shape):
            return None
    if any(names[name] in stored for name in everything.keys() - parameters.keys()):
        return None  # tied weights that are stored one by one may differ, and are not tied then
    heads = {name for name in stored if model_files.HEAD.match(name)} - {score_head.WEIGHT}
    if heads or model.state_dict().keys() - everything.keys():
        return None
    # Of the same shapes, without memory.
    replace_parameters(model, lambda meta: nn.Parameter(torch.zeros((), dtype=dtype).expand(meta.shape)))
    split_model(model, ways)
    files = model_files.weight_files(where) or {}
    for name, parameter in logging.tqdm(list(model.named_parameters()), desc="Loading weights"):
        shape, part = tuple(parameter.shape), [slice(None)] * parameter.dim()
        if (dim := tensor_parallel.split_dim(parameter)) is not None:
            first = tensor_parallel.place(parameter) * shape[dim]
            part[dim] = slice(first, first + shape[dim])
        if names[name] not in stored:
            parameter.data = torch.zeros(shape, dtype=dtype)
            continue
        with safe_open(where / files[names[name]], framework="pt") as file:
            parameter.data = file.get_slice(names[name])[tuple(part)].to(dtype).contiguous()
    if (where / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace parameters, such as those on the meta device, in place; tied ones stay tied."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, replaced.setdefault(id(parameter), make(parameter)))
