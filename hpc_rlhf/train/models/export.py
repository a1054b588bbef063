"""The whole weights of a model in training, gathered from their shards and written as a folder, and
long reads and writes that a stop interrupts.
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.files import file_system_error
from hpc_rlhf.train.models.lora import Adapter, LoraLinear, of_experts
from hpc_rlhf.train.models.score_head import ScoreHead
from hpc_rlhf.train.parallel import tensor_parallel
from hpc_rlhf.train.parallel.deepspeed_internals import full_numel, is_zero3
from hpc_rlhf.train.plain_turns import plain_template
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled

# Largest weights file: a second or two at a time, after which a stop can take effect.
SHARD = "2GB"
# Bytes gathered at once: small weights share a collective, and memory stays bounded.
GATHERED_AT_ONCE = 2**26


def gathered(parameters: list[nn.Parameter], to_change: bool = False) -> AbstractContextManager[Any]:
    """Within it, the parameters are whole on every rank. Collective under ZeRO-3.

    Changes are lost, except those of rank 0 with ``to_change``.
    """
    if not any(map(is_zero3, parameters)):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if to_change else None)


def full_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of parameters when none of them is sharded or split."""
    return sum(full_numel(p) * tensor_parallel.split_ways(p) * p.element_size() for p in parameters)


@dataclass(frozen=True)
class ModuleWeights:
    """The parameters that a module holds itself; an adapted layer includes its adapter."""

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights by their Hugging Face names, the adapter merged. ZeRO-3 shards must have been gathered.

        Collective in the tensor-parallel group if they are split.
        """
        prefix = f"{self.name}." if self.name else ""
        if isinstance(self.module, LoraLinear):
            layer: nn.Module = self.module.base
            adapters: dict[str, Adapter] = {"weight": self.module}
        else:
            layer = self.module
            adapters = {**of_experts(layer)}
        factors = {id(factor) for adapter in adapters.values() for factor in (adapter.lora_a, adapter.lora_b)}
        own = set(map(id, self.parameters)) - factors
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in own:
                tensor = adapters[name].merged_weight() if name in adapters else parameter.detach()
                if isinstance(layer, ScoreHead):
                    tensor = layer.float_weight().detach()
                yield prefix + name, tensor_parallel.gather(layer, name, tensor)


def module_weights(model: nn.Module, prefix: str = "") -> list[ModuleWeights]:
    """A model's weights by module, in module order. Tied parameters come once."""
    seen: set[int] = set()
    modules = []
    for name, module in model.named_modules(prefix=prefix):
        deep = isinstance(module, LoraLinear)
        own = [p for p in module.parameters(recurse=deep) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            modules.append(ModuleWeights(name, module, own))
    return modules


@contextmanager
def whole(modules: Sequence[ModuleWeights]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Within it, all weights of the modules by their Hugging Face names.

    Collective if sharded or split: every rank must iterate to the end.
    """
    with gathered([p for module in modules for p in module.parameters]), torch.no_grad():
        yield (weight for module in modules for weight in module.weights())


def full_weights(
    modules: Sequence[ModuleWeights], at_once: int = GATHERED_AT_ONCE
) -> Generator[tuple[str, Tensor], None, None]:
    """Every weight of the modules by its Hugging Face name, whole and with adapters merged.

    Collective if sharded or split: every rank must iterate to the end. A tensor may be a
    view of the parameter and is valid only until the next one.

    Args:
        at_once: bytes gathered at the same time, at most, or those of a module that has more.
    """
    batch: list[ModuleWeights] = []
    size = 0
    for module in modules:
        own = full_bytes(module.parameters)
        if batch and size + own > at_once:
            with whole(batch) as weights:
                yield from weights
            batch, size = [], 0
        batch.append(module)
        size += own
    with whole(batch) as weights:
        yield from weights


@contextmanager
def interruptible(should_stop: Callable[[], bool]) -> Iterator[None]:
    """Within it, transformers stops loading or writing a model as soon as ``should_stop`` is true.

    transformers reports progress through a hook that sees each tensor or file; a version without it is not interrupted.

    Raises:
        WorkCancelled: ``should_stop`` was true.
    """
    from transformers.utils import logging

    set_hook = getattr(logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return

    def check_before_each(items: Any) -> Iterator[Any]:
        for item in items:
            if should_stop():
                raise WorkCancelled
            yield item

    def hook(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            return bar(**kwargs)
        items, *others = args
        return bar(check_before_each(items), *others, **kwargs)

    previous = set_hook(hook)
    try:
        yield
    finally:
        set_hook(previous)


def named_weights(model: Any) -> Generator[tuple[str, Tensor], None, None]:
    """``full_weights`` of a model, and its persistent buffers. Collective like those."""
    # A buffer may belong to the checkpoint as well (GPT-NeoX's bias, for one).
    persistent = {name for name in model.state_dict() if ".base." not in name and ".lora_" not in name}
    yield from full_weights(module_weights(model))
    yield from ((name, tensor) for name, tensor in model.named_buffers() if name in persistent)


def collect(
    weights: Generator[tuple[str, Tensor], None, None], is_main: bool, between: Callable[[], object] = bool
) -> dict[str, Tensor]:
    """A copy of ``named_weights`` in rank 0's memory; empty elsewhere. Collective.

    ``between`` is called before each weight; it may raise, on all ranks alike.
    """
    state: dict[str, Tensor] = {}
    with closing(weights):
        for name, tensor in weights:
            between()
            if is_main:
                state[name] = tensor.to("cpu", copy=True).contiguous()
    return state


def write(
    model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path, should_stop: Callable[[], bool] = bool
) -> None:
    """Write a Hugging Face folder that ``from_pretrained`` loads, with a chat template and the longest context.

    Args:
        model: the model whose weights ``state`` holds; its generation config is changed.
        should_stop: asked before each weights file, of at most SHARD or one weight.

    Raises:
        WorkCancelled: ``should_stop`` returned True.
        HpcRlhfError: the file system is full, or refuses otherwise; what was written is removed.
    """
    generation, eos = getattr(model, "generation_config", None), tokenizer.eos_token_id
    if generation is not None:
        # Generation ends responses where training did; the base model may have ended texts elsewhere.
        known = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        others = [number for number in known if number not in (None, eos)]
        generation.eos_token_id = [eos, *others] if others else eos
    saved = copy(tokenizer)  # in this process, no template means plain turns
    saved.chat_template = tokenizer.chat_template or plain_template(tokenizer)
    saved.model_max_length = min(tokenizer.model_max_length, context_length(model.config) or sys.maxsize)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with interruptible(should_stop):
            model.save_pretrained(str(folder), state_dict=state, max_shard_size=SHARD)
        saved.save_pretrained(str(folder))
    except Exception as error:
        refused = file_system_error(error)
        if refused is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)  # the ledger needs space
        size = sum(tensor.nbytes for tensor in state.values()) / 1e9
        raise HpcRlhfError(
            f"the model could not be written: {refused.strerror}",
            where=f"{folder} on {socket.gethostname()}",
            hint=f"free {size:.3g} GB and run the stage again; it continues from the last checkpoint",
            exit_code=RUN_FAILED,
        ) from error


def context_length(config: Any) -> int | None:
    """The longest sequence that a model takes, in tokens; None if its configuration names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def export(model: Any, tokenizer: Any, folder: Path, is_main: bool) -> None:
    """``collect`` and ``write``. Collective; rank 0 writes."""
    state = collect(named_weights(model), is_main)
    if is_main:
        write(model, state, tokenizer, folder)
