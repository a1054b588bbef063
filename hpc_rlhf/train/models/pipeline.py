"""Pipeline parallelism: the layers of a language model divided over stages, each on a rank of its own.

DeepSpeed's pipeline engine moves hidden states and their gradients between the stages, in turns of one forward and one
backward pass (1F1B, arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_rlhf.spec.training import TrainingSpec
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models import structure
from hpc_rlhf.train.models.division import divide, refusal
from hpc_rlhf.train.models.language_model import LanguageModel, hidden_states, padding
from hpc_rlhf.train.models.vocabulary import split_model
from hpc_rlhf.train.parallel import deepspeed_internals as internals
from hpc_rlhf.train.runtime.world import World

Weights = Generator[tuple[str, Tensor], None, None]


class PipelineStage(nn.Module):
    """A stage of a language model, called like ``LanguageModel``.

    All ranks of a pipeline call it with the same sequences. While DeepSpeed trains, it moves the hidden states; without
    gradients, the stages move them themselves.

    Attributes:
        losses: what computes the losses of a step's micro-batches, in order, by calling this module once each.
        grad_norm: of the last step, where DeepSpeed does not keep it.
    """

    def __init__(self, causal: Any, world: World) -> None:
        super().__init__()
        self.causal = causal
        self.ranks = world.dims.group("pipeline", world.rank)
        self.place = world.dims.coordinate("pipeline", world.rank)
        self.counts_whole = world.dims.coordinate("tensor", world.rank) == 0
        self.losses: Iterator[Callable[[], Tensor]] = iter(())
        self.grad_norm = 0.0
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    @property
    def is_last(self) -> bool:
        return self.place == len(self.ranks) - 1

    def forward(
        self, ids: Tensor, lengths: tuple[int, ...], predicted: Tensor, temperature: float = 1.0,
        with_entropies: bool = False, summed: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What ``LanguageModel.forward`` returns; zeros without a gradient on all stages but the last."""
        trains = torch.is_grad_enabled()
        hidden = hidden_states(
            structure.body(self.causal), ids, lengths, self._input if trains or not self.place else self._receive(ids)
        )
        if self.is_last:
            head = self.causal.get_output_embeddings()
            outputs: tuple[Tensor, Tensor] = head(
                hidden[predicted - 1], ids[predicted], temperature, with_entropies, summed
            )
            return outputs
        if trains:
            self._output = hidden
        else:
            dist.send(hidden.contiguous(), self.ranks[self.place + 1])
        return torch.zeros(() if summed else len(predicted), device=ids.device), torch.zeros(0, device=ids.device)

    def _receive(self, ids: Tensor) -> Tensor:
        rows = len(ids) + sum(padding(len(ids), ids.device))
        width = self.causal.config.get_text_config().hidden_size
        hidden = torch.empty(rows, width, dtype=self.causal.dtype, device=ids.device)
        dist.recv(hidden, self.ranks[self.place - 1])
        return hidden

    def pass_on(self, received: Tensor) -> Tensor:
        """A micro-batch in training: from the hidden states of the stage before, which the first stage ignores, those
        for the next stage, or on the last one the loss."""
        self._input = received if self.place else None
        loss = next(self.losses)()
        output = loss if self.is_last else self._output
        self._input = self._output = None
        assert output is not None
        return output

    def clip(self, engine: Any, limit: float) -> None:
        """Clip the gradients by their norm over the whole model, and keep that. Collective."""
        counted = [
            p.grad  # of what is whole on the ranks that share a layer, one of them counts it
            for p in self.parameters()
            if p.grad is not None and not internals.is_copy(p) and (self.counts_whole or internals.is_split(p))
        ]
        square = torch.nn.utils.get_total_norm(counted).square()
        dist.all_reduce(square, group=internals.model_group(engine))
        self.grad_norm = float(square.sqrt())
        torch.nn.utils.clip_grads_with_norm_(self.parameters(), limit, square.sqrt())


def training_engine(
    model: Any, dtype: torch.dtype, ds_config: dict[str, Any], spec: TrainingSpec, lr: float, total: int,
    world: World, source: str,
) -> tuple[Any, PipelineStage]:  # fmt: skip
    """DeepSpeed's engine for this rank's stage of a model, and the stage. Collective.

    Args:
        model: of transformers, whole and the same on all ranks; taken apart in place.
        dtype: of the stage.

    Raises:
        HpcRlhfError: the model's layers cannot be taken apart.
    """
    division = divide(LanguageModel(model), dtype, world, source)
    split_model(model, world.dims.tensor)
    stage = PipelineStage(model, world).to(world.device)
    module = internals.pipeline_module(stage, world.dims.data, world.dims.pipeline, world.dims.tensor, division.tied)
    config = {name: value for name, value in ds_config.items() if name != "tensor_parallel"}  # it is split already
    config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if spec.zero == 0:  # DeepSpeed clips by the norm of one stage
        config["gradient_clipping"] = 0.0
    engine = engines.training_engine(module, config, spec, lr, total)
    if spec.zero == 0:
        internals.inner_optimizer(engine).register_step_pre_hook(lambda *_: stage.clip(engine, spec.clip_grad))
    division.verify(world, partial(refusal, model, source))
    return engine, stage


def of_all_stages(weights: Weights, world: World) -> Weights:
    """The weights of a whole model, given those of this rank's stage. Collective over all ranks.

    Only rank 0 gets their values; elsewhere, those of other stages are empty.
    """
    if world.dims.pipeline == 1:
        yield from weights
        return
    owners = world.dims.group("pipeline", 0)
    while True:
        name, own = next(weights, (None, torch.empty(0)))
        facts = world.gather((name, list(own.shape), str(own.dtype).removeprefix("torch.")))
        if not any(name for name, _, _ in facts):
            return
        for rank in owners:
            name, shape, dtype = facts[rank]
            if name is None:
                continue
            tensor = own
            if rank > 0 and world.is_main:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                dist.recv(tensor, rank, group=world.control)
            elif rank == world.rank > 0:
                dist.send(own.detach().cpu().contiguous(), 0, group=world.control)
            yield name, tensor
