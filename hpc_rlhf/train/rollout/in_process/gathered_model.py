"""A copy of the model in training that holds whole weights, gathered for the time of a rollout."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.models import packed_attention, rotary, structure
from hpc_rlhf.train.models.export import ModuleWeights, full_bytes, full_weights, module_weights, whole
from hpc_rlhf.train.models.part_loading import replace_parameters
from hpc_rlhf.train.parallel.deepspeed_internals import is_split, is_zero3


class GatheredModel:
    """A model without hooks and adapters that borrows another's whole weights, or gathers its sharded ones.

    If the model is too large to gather whole, as many layers are gathered as the budget allows; each of the
    others is gathered in every forward pass, just before it is used.

    Args:
        model: the transformers model inside the training engine.
        budget: bytes that gathered weights may take, the same on all ranks. Embeddings, head and one layer
            are always gathered.

    Attributes:
        module: the copy, in eval mode.
        streamed: the layers gathered in every forward pass. If there are any, all ranks must make their
            forward passes together.
    """

    def __init__(self, model: Any, budget: int) -> None:
        from accelerate import init_empty_weights

        self.model = model
        self._in_use = ExitStack()  # holds the streamed layer in use
        self.sharded = any(map(is_zero3, model.parameters()))
        config = copy.deepcopy(model.config)
        config.dtype = model.dtype  # may be its name, which some architectures do not take
        with init_empty_weights(include_buffers=False):
            self.module = type(model)(config).eval()
        self.module.tie_weights()  # the meta device has untied them
        packed_attention.enable(self.module)
        rotary.separate(self.module)
        replace_parameters(
            self.module, lambda meta: nn.Parameter(torch.empty(0, dtype=meta.dtype), requires_grad=False)
        )
        self.weights = dict(self.module.named_parameters())
        self.resident = module_weights(model)
        self.streamed: list[list[ModuleWeights]] = []
        must_gather = self.sharded or any(map(is_split, model.parameters()))
        if must_gather and full_bytes(model.parameters()) > budget:
            self._stream(budget)

    def _stream(self, budget: int) -> None:
        """Keep as many layers resident as fit beside the one in use; stream the others."""
        path, layers = _layers(self.model)
        inside = [module_weights(layer, f"{path}.{number}") for number, layer in enumerate(layers)]
        outside = [module for module in self.resident if not module.name.startswith(f"{path}.")]
        largest = max(_bytes(layer) for layer in inside)
        count = max(0, (budget - _bytes(outside)) // largest - 1)
        self.resident = outside + [module for layer in inside[:count] for module in layer]
        self.streamed = inside[count:]
        for layer, copied in zip(self.streamed, _layers(self.module)[1][count:], strict=True):
            copied.register_forward_pre_hook(partial(self._gather, layer))
            copied.register_forward_hook(self._release)

    def _gather(self, layer: Sequence[ModuleWeights], *_: Any) -> None:
        for name, tensor in self._in_use.enter_context(whole(layer)):
            self.weights[name].data = tensor
            self._in_use.callback(_free, self.weights[name])

    def _release(self, *_: Any) -> None:
        self._in_use.close()

    def join_forward(self) -> None:
        """Give this rank's shards to a forward pass of other ranks. Collective."""
        for layer in self.streamed:
            with whole(layer) as weights:
                for _ in weights:
                    pass

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Within it, the copy has its weights; afterwards they are freed. Collective if sharded or split."""
        try:
            for name, tensor in full_weights(self.resident):
                # A gathered weight is valid only until the next one; a whole one is shared with the model.
                self.weights[name].data = tensor.clone() if self.sharded else tensor
            buffers = dict(self.model.named_buffers())
            for name, buffer in self.module.named_buffers():
                buffer.data = buffers[name].data if name in buffers else buffer.data
            yield
        finally:
            self._in_use.close()
            for weight in self.weights.values():
                _free(weight)


def _free(weight: Tensor) -> None:
    weight.data = weight.data.new_empty(0)


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    """A model's list of layers, and its name."""
    layers = structure.layers(model)
    if layers is not None:
        return layers
    raise HpcRlhfError(
        "the model is too large to gather for a rollout, and its list of layers was not found",
        where=type(model).__name__,
        hint="use GPUs with more memory",
    )


def _bytes(modules: Sequence[ModuleWeights]) -> int:
    return sum(full_bytes(module.parameters) for module in modules)
