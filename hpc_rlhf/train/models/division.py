"""A language model taken apart into the stages of a pipeline.

A stage runs the model's own forward pass, in which the modules of other stages pass on what they get. So whatever a
family computes around its layers, such as rotary positions, is computed as ever. Each stage is compared with the same
layers of the whole model, and a family that does other things between its layers is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.pipeline import stage_bounds
from hpc_rlhf.train.models import agreement, packed_attention, structure
from hpc_rlhf.train.models.language_model import LanguageModel, hidden_states
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.runtime.world import World


class Elsewhere(nn.Module):
    """Stands in for a module that another stage has, and passes its input on."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class AddedBefore(nn.Module):
    """Stands in for an embedding of positions, which the first stage has added."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(())


@dataclass(frozen=True)
class Trace:
    """A pass of random sequences through a whole model.

    Attributes:
        layers: the model's layers; they belong to ``owner``.
        before, after: the modules of the owner that run before and after its layers, by name.
        inputs: what each layer got: (1, rows, hidden).
        log_probs: of all tokens but the first of each sequence.
    """

    batch: Ragged
    owner: nn.Module
    layers: nn.ModuleList
    before: dict[str, nn.Module]
    after: dict[str, nn.Module]
    inputs: list[Tensor]
    log_probs: Tensor

    @classmethod
    def through(cls, whole: LanguageModel, name: str, layers: nn.ModuleList) -> Trace:
        """Run a model whose layers are those of that name in its body."""
        owner = structure.body(whole.causal).get_submodule(name.rpartition(".")[0])
        inputs: list[Tensor] = []
        before: dict[str, nn.Module] = {}
        after: dict[str, nn.Module] = {}

        def note(name: str, module: nn.Module, *_: Any) -> None:
            (after if inputs else before)[name] = module

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"]).detach())

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
        for child_name, child in owner.named_children():
            hooks.append(child.register_forward_pre_hook(partial(note, child_name)))
        sequences = agreement.random_sequences(whole.causal.config, agreement.LENGTHS, torch.device("cpu"))
        batch = Ragged(torch.cat(sequences), tuple(map(len, sequences)))
        with agreement.undisturbed(torch.device("cpu")):
            log_probs, _ = whole(batch.ids, batch.lengths, predicted(batch))
        for hook in hooks:
            hook.remove()
        return cls(batch, owner, layers, before, after, inputs, log_probs)


def predicted(batch: Ragged) -> Tensor:
    """Indices of all tokens but the first of each sequence."""
    return batch.tail([length - 1 for length in batch.lengths])


@dataclass(frozen=True)
class Division:
    """Which layers of a model a stage keeps.

    Attributes:
        place: the stage's number.
        bounds: see ``stage_bounds``.
        tied: the output head's weight if it is the embeddings', which the first and the last stage then both have.
    """

    causal: Any
    trace: Trace
    place: int
    bounds: list[int]
    tied: nn.Parameter | None

    @property
    def is_last(self) -> bool:
        return self.place == len(self.bounds) - 2

    def apply(self, dtype: torch.dtype) -> None:
        """Replace what other stages have, and convert the parameters of this one, in place."""
        causal, trace = self.causal, self.trace
        embedding = causal.get_input_embeddings()
        own = range(*self.bounds[self.place : self.place + 2])
        for number in set(range(len(trace.layers))) - set(own):
            trace.layers[number] = Elsewhere()
        if self.place:
            for name, module in trace.before.items():
                if _weights([module]) and not (module is embedding and self.tied is not None and self.is_last):
                    setattr(trace.owner, name, AddedBefore() if isinstance(module, nn.Embedding) else Elsewhere())
        if not self.is_last:
            for name, module in trace.after.items():
                if _weights([module]):
                    setattr(trace.owner, name, Elsewhere())
            if self.tied is None or self.place:
                causal.set_output_embeddings(Elsewhere())
        for parameter in causal.parameters():
            parameter.data = parameter.data.to(dtype)
        causal.config.dtype = dtype

    def verify(self, world: World, refuse: Callable[[str], HpcRlhfError]) -> None:
        """Compare what the stage computes with what the whole model did. Collective."""
        trace, start, stop = self.trace, *self.bounds[self.place : self.place + 2]
        ids, lengths = trace.batch.ids.to(world.device), trace.batch.lengths
        received = trace.inputs[start][0].to(world.device, self.causal.dtype) if self.place else None
        with agreement.undisturbed(world.device):
            try:
                actual = hidden_states(structure.body(self.causal), ids, lengths, received)
                expected = trace.log_probs if self.is_last else trace.inputs[stop][0]
                if self.is_last:
                    chosen = predicted(trace.batch).to(world.device)
                    actual, _ = self.causal.get_output_embeddings()(actual[chosen - 1], ids[chosen])
                far = agreement.distance(actual.double().cpu(), expected.double())
            except Exception:  # any kind: the family does not pass on what it gets
                far = float("inf")
        if world.max(far > max(map(agreement.tolerance, (self.causal.dtype, trace.inputs[0].dtype)))):
            raise refuse("their stages do not compute what the whole model does")


def divide(whole: LanguageModel, dtype: torch.dtype, world: World, source: str) -> Division:
    """Take a model apart, and leave this rank its stage, in place. Collective.

    Args:
        whole: with the same weights on all ranks, on the CPU.
        dtype: of the stage.

    Raises:
        HpcRlhfError: the model's layers cannot be taken apart.
    """
    causal, stages = whole.causal, world.dims.pipeline
    agreement.verify(whole, replace(world, device=torch.device("cpu")), source)
    layers = structure.layers(structure.body(causal))
    if layers is None or not whole.chunked or not packed_attention.is_enabled(causal):
        raise refusal(causal, source, "they cannot run on packed rows, or change the logits of their head")
    if len(layers[1]) < stages:
        raise refusal(causal, source, f"this one has {len(layers[1])} layers for {stages} stages")
    trace = Trace.through(whole, *layers)
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    around = [*trace.before.values(), *trace.after.values(), head]
    if _weights([causal]) != _weights([*trace.layers, *around]):
        raise refusal(causal, source, "they have weights besides embeddings, layers, norm and head")
    before, after = _weights(trace.before.values()), _weights([*trace.after.values(), head])
    bounds = stage_bounds([_weights([layer]) for layer in trace.layers], before, after, stages)
    tied = head.weight if head.weight is embedding.weight else None
    division = Division(causal, trace, world.dims.coordinate("pipeline", world.rank), bounds, tied)
    division.apply(dtype)
    return division


def refusal(causal: Any, source: str, why: str) -> HpcRlhfError:
    return HpcRlhfError(
        f"pipeline_parallel does not support {causal.config.model_type} models: {why}",
        where=source,
        hint="leave pipeline_parallel out; zero: 3 shards any model",
    )


def _weights(modules: Iterable[nn.Module]) -> int:
    """Number of the modules' parameters' elements, each once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
