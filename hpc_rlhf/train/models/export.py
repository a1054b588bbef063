"""The whole weights of a model in training, wherever its shards lie."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.train.models.interruptible_loading import interruptible
from hpc_rlhf.train.models.lora import LoraLinear
from hpc_rlhf.train.parallel import tensor_parallel

# The largest file of weights: a second or two at a time, after which a stop is heard.
SHARD = "2GB"
# Bytes of shards that are made whole at once: many small weights share a collective, and memory is spared.
GATHERED_AT_ONCE = 2**26


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


def size(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of parameters when none of them is sharded or cut."""
    return sum(
        getattr(p, "ds_numel", p.numel()) * getattr(p, "cut_into", 1) * p.element_size() for p in parameters
    )


@dataclass(frozen=True)
class Part:
    """The parameters that a module holds itself, an adapted layer with its adapter.

    Attributes:
        name: the module's.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights by their Hugging Face names, the adapter folded in. They must not be sharded by ZeRO-3.

        Collective in the group where they are cut.
        """
        prefix = f"{self.name}." if self.name else ""
        layer = self.module.base if isinstance(self.module, LoraLinear) else self.module
        for name, tensor in self._own():
            yield prefix + name, tensor_parallel.joined(layer, name, tensor)

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.module, LoraLinear):
            yield "weight", self.module.merged_weight()
            if self.module.base.bias is not None:
                yield "bias", self.module.base.bias.detach()
            return
        own = set(map(id, self.parameters))
        for name, parameter in self.module.named_parameters(recurse=False):
            if id(parameter) in own:
                yield name, parameter.detach()


def parts(model: nn.Module, prefix: str = "") -> list[Part]:
    """All parts of a model in the order of its modules. Tied parameters come once."""
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules(prefix=prefix):
        deep = isinstance(module, LoraLinear)
        own = [p for p in module.parameters(recurse=deep) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            found.append(Part(name, module, own))
    return found


@contextmanager
def whole(found: Sequence[Part]) -> Iterator[list[tuple[str, Tensor]]]:
    """Within it, all weights of the parts by their Hugging Face names. Collective under ZeRO-3 and where cut."""
    with gathered([p for part in found for p in part.parameters]), torch.no_grad():
        yield [weight for part in found for weight in part.weights()]


def full_weights(model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
    """Every parameter of a model by its Hugging Face name, whole and with adapters folded in.

    A collective operation under ZeRO-3 and where layers are cut, some parts at a time: every rank must iterate to the end. A tensor
    may be a view of the parameter and is good only until the next one is asked for. Tied parameters
    come once.
    """
    return in_turn(parts(model))


def in_turn(found: Sequence[Part]) -> Generator[tuple[str, Tensor], None, None]:
    """The weights of ``full_weights``, of these parts."""
    waiting: list[Part] = []
    bytes_waiting = 0
    for part in found:
        if waiting and bytes_waiting + size(part.parameters) > GATHERED_AT_ONCE:
            with whole(waiting) as weights:
                yield from weights
            waiting, bytes_waiting = [], 0
        waiting.append(part)
        bytes_waiting += size(part.parameters)
    with whole(waiting) as weights:
        yield from weights


def collect(model: Any, is_main: bool, between: Callable[[], object] = bool) -> dict[str, Tensor]:
    """A copy of the weights of ``full_weights`` and of the buffers that are kept with them, in rank 0's memory; nothing
    elsewhere. Collective.

    Args:
        model: the transformers model, not its DeepSpeed engine.
        between: called before each weight; it may raise, on all ranks alike.
    """
    # A buffer may be part of the checkpoint too (GPT-NeoX's bias, for one).
    persistent = {name for name in model.state_dict() if ".base." not in name and ".lora_" not in name}
    buffers = ((name, tensor) for name, tensor in model.named_buffers() if name in persistent)
    state: dict[str, Tensor] = {}
    with closing(full_weights(model)) as weights:
        for name, tensor in chain(weights, buffers):
            between()
            if is_main:
                state[name] = tensor.to("cpu", copy=True).contiguous()
    return state


def write(
    model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path, told: Callable[[], bool] = bool
) -> None:
    """Write a Hugging Face folder that ``from_pretrained`` loads.

    Args:
        model: whose weights ``state`` holds; it is used up.
        folder: made if it is not there.
        told: asked before each file of weights, of at most SHARD or a single weight, whether to drop it all.

    Raises:
        Interrupted: ``told`` said so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _stop_at(getattr(model, "generation_config", None), tokenizer.eos_token_id)
    with interruptible(told):
        model.save_pretrained(str(folder), state_dict=state, max_shard_size=SHARD)
    tokenizer.save_pretrained(str(folder))


def export(model: Any, tokenizer: Any, folder: Path, is_main: bool) -> None:
    """``collect`` and ``write`` in one. Collective; rank 0 writes."""
    state = collect(model, is_main)
    if is_main:
        write(model, state, tokenizer, folder)


def _stop_at(generation: Any, eos_id: int) -> None:
    """Let ``generate`` end answers where training did, which need not be where the base model ended documents."""
    if generation is None:
        return
    known = generation.eos_token_id
    others = known if isinstance(known, list) else [known]
    ids = [eos_id, *(number for number in others if number not in (None, eos_id))]
    generation.eos_token_id = ids if len(ids) > 1 else eos_id
