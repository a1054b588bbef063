"""A second model of the actor's architecture that has whole weights for the time of a rollout."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.export import Part, in_turn, is_sharded, parts, size, whole
from hpc_rlhf.train.parallel.tensor_parallel import is_cut


class Twin:
    """A model without hooks and adapters, which borrows another's weights or gathers its shards or parts.

    Of a model that is not to be gathered as a whole, as many layers are as the budget allows; each of the others is
    gathered whenever a forward pass comes to it.

    Args:
        model: the transformers model inside the training engine.
        budget: bytes that gathered weights may take, the same on all ranks. Embeddings, head and one layer are
            gathered in any case.

    Attributes:
        module: the twin, in eval mode.
        streamed: the layers that are gathered in every forward pass; if there are any, all ranks must make their
            forward passes together.
    """

    def __init__(self, model: Any, budget: int) -> None:
        from accelerate import init_empty_weights

        self.model = model
        self._borrowed = ExitStack()  # gives back the layer in use
        self.sharded = is_sharded(list(model.parameters()))
        with init_empty_weights(include_buffers=False):
            self.module = type(model)(copy.deepcopy(model.config)).eval()
        self.module.tie_weights()  # taking the memory away has parted what is tied
        packed_attention.enable(self.module)
        _be_real(self.module)
        self.weights = dict(self.module.named_parameters())
        self.held = parts(model)
        self.streamed: list[list[Part]] = []
        apart = self.sharded or any(map(is_cut, model.parameters()))
        if apart and size(model.parameters()) > budget:
            self._stream(budget)

    def _stream(self, budget: int) -> None:
        """Hold as many layers as fit beside the one in use; gather the others in their turn."""
        path, layers = _layers(self.model)
        inside = [parts(layer, f"{path}.{number}") for number, layer in enumerate(layers)]
        outside = [part for part in self.held if not part.name.startswith(f"{path}.")]
        largest = max(_bytes(found) for found in inside)
        held = max(0, (budget - _bytes(outside)) // largest - 1)
        self.held = outside + [part for found in inside[:held] for part in found]
        self.streamed = inside[held:]
        for found, twin in zip(self.streamed, _layers(self.module)[1][held:], strict=True):
            twin.register_forward_pre_hook(partial(self._borrow, found))
            twin.register_forward_hook(self._return)

    def _borrow(self, layer: Sequence[Part], *_: Any) -> None:
        for name, tensor in self._borrowed.enter_context(whole(layer)):
            self.weights[name].data = tensor
            self._borrowed.callback(_drop, self.weights[name])

    def _return(self, *_: Any) -> None:
        self._borrowed.close()

    def walk(self) -> None:
        """Give this rank's shards to a forward pass that other ranks make. Collective."""
        for layer in self.streamed:
            with whole(layer):
                pass

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Within it, the twin has its weights, whose memory is given back afterwards. Collective under ZeRO-3 and where cut."""
        try:
            for name, tensor in in_turn(self.held):
                # What was gathered lasts only until the next; what lies whole in the model is shared.
                self.weights[name].data = tensor.clone() if self.sharded else tensor
            buffers = dict(self.model.named_buffers())
            for name, buffer in self.module.named_buffers():
                buffer.data = buffers[name].data if name in buffers else buffer.data
            yield
        finally:
            self._borrowed.close()
            for weight in self.weights.values():
                _drop(weight)


def _drop(weight: Tensor) -> None:
    weight.data = weight.data.new_empty(0)


def _be_real(module: nn.Module) -> None:
    """Empty tensors in place of a model's parameters on no device; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            empty = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False)
            setattr(part, name, made.setdefault(id(parameter), empty))


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    """A model's layers, and their name."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise HpcRlhfError(
        "the model is too large to be gathered for a rollout, and its layers are not found",
        where=type(model).__name__,
        hint="use GPUs with more memory",
    )


def _bytes(found: Sequence[Part]) -> int:
    return sum(size(part.parameters) for part in found)
