"""A decode step: one token of each row through a model, over the keys and values of those before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hpc_rlhf.train.rollout.in_process import cuda_graphs
from hpc_rlhf.train.rollout.in_process.cpu_decode import Matrix, Place, matrices, places, traced

# Decode steps after which one is traced, and those that the trace then has to give the same bits for.
TRACED_AFTER = 64
ON_TRIAL = 32
CHANGING_ROPE = ("dynamic", "longrope")


class DecodeStep:
    """A model's decode step as a function of tensors alone.

    On a CPU it takes the ways of ``on_cpu``. A trace is used once it has given the same bits as the model for some
    steps, and not at all if it does not. On a GPU it takes those of ``on_cuda``.

    Args:
        model: a causal language model that takes a mask of four dimensions.
        may_trace: the model runs no Python that a trace would leave out, and has its weights as long as ``ready``.
    """

    def __init__(self, model: Any, may_trace: bool = False) -> None:
        self.model = model
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if keeps else {}
        self.may_trace = may_trace
        # Rotary positions that change their ways at some length would be fixed to one.
        fixed = not any(kind in str(getattr(model.config, "rope_parameters", "")) for kind in CHANGING_ROPE)
        self.steps_to_trace = TRACED_AFTER if may_trace and fixed else -1
        self.may_record = may_trace and fixed
        self.recorded: cuda_graphs.RecordedSteps | None = None  # of this rollout
        self.on_trial = ON_TRIAL
        self.matrices: list[Matrix] | None = None  # not looked for yet
        self.made: list[Callable[..., Tensor]] = []  # the trace, if any
        self.places: list[Place] = []  # of what it takes besides
        self.weights: list[Tensor] = []  # what stands there now

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it, the model's weights stay as they are, and steps may be taken."""
        recorder = cuda_graphs.recorder(self.model.device) if self.may_record else None
        if recorder is not None:
            with self._recording(recorder):
                yield
            return
        if not self.may_trace or self.model.device.type != "cpu":
            yield
            return
        if self.matrices is None:
            self.matrices = matrices(self.model)
        try:
            for matrix in self.matrices:
                matrix.fill()
            self.weights = [holder[name] for holder, name in self.places]
            # Optimizing would change a trace's arithmetic after some calls.
            with torch.jit.optimized_execution(False):
                yield
        finally:
            self.weights = []
            for matrix in self.matrices:
                matrix.drop()

    @contextmanager
    def _recording(self, recorder: cuda_graphs.Recorder) -> Iterator[None]:
        self.recorded = cuda_graphs.RecordedSteps(self.forward, recorder)
        try:
            yield
        finally:
            self.may_record = not self.recorded.failed
            self.recorded.close()
            self.recorded = None

    def forward(self, tokens: Tensor, rows: Tensor, places: Tensor, mask: Tensor, *buffers: Tensor) -> Tensor:
        """Logits of the next tokens: (rows, vocabulary).

        Args:
            tokens: (rows,), int64.
            rows, places: (rows,), int64; where in the buffers the tokens' keys and values go. A place is a position.
            mask: (rows, columns), 0 where a row may look, its own place included, and -inf elsewhere.
            buffers: (rows, columns, heads, dim); the keys of all layers, then their values.
        """
        output = self.model(
            input_ids=tokens.unsqueeze(1), position_ids=places.unsqueeze(1), attention_mask=mask[:, None, None],
            past_key_values=_StepCache(buffers, rows, places), use_cache=True, **self.last_only,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits

    def take(self, *inputs: Tensor) -> Tensor:
        """The same as ``forward``, traced or recorded or not."""
        if self.recorded is not None:
            return self.recorded.take(*inputs)
        if self.steps_to_trace == 0 and inputs[0].device.type == "cpu":
            self._trace(inputs)
        self.steps_to_trace -= 1
        if not self.made:
            return self.forward(*inputs)
        logits = self.made[0](*inputs, *self.weights)
        if self.on_trial > 0:
            self.on_trial -= 1
            by_model = self.forward(*inputs)
            if not torch.equal(logits, by_model):
                self.made.clear()
            return by_model
        return logits

    def _trace(self, inputs: Sequence[Tensor]) -> None:
        self.places = places(self.model, self.matrices or [])
        self.weights = [holder[name] for holder, name in self.places]
        try:
            made = traced(self.forward, _example(inputs, 2, 1), self.places)
            for rows, place in ((1, 0), (3, inputs[4].shape[1] - 1), (2, 40)):
                example = _example(inputs, rows, min(place, int(inputs[2].max())))
                if not torch.equal(made(*example, *self.weights), self.forward(*example)):
                    return
        except Exception:  # of whatever kind: the model does what a trace cannot follow
            return
        self.made.append(made)


def _example(inputs: Sequence[Tensor], rows: int, place: int) -> tuple[Tensor, ...]:
    """Inputs of the same kinds for so many rows that are as long as ``place``."""
    mask, buffers = inputs[3], inputs[4:]
    columns = place + 1
    return (
        torch.arange(1, rows + 1),
        torch.arange(rows),
        torch.full((rows,), place),
        mask.new_zeros(rows, columns),
        *[
            torch.linspace(-1, 1, rows * columns * b[0, 0].numel()).view(rows, columns, *b.shape[2:]).to(b)
            for b in buffers
        ],
    )


class _StepCache(Cache):
    """What a layer adds a token of each row to, and attends over."""

    def __init__(self, buffers: Sequence[Tensor], rows: Tensor, columns: Tensor) -> None:
        super().__init__(layers=[])
        self.keys, self.values = buffers[: len(buffers) // 2], buffers[len(buffers) // 2 :]
        self.at = (rows, columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_put_(self.at, key_states[:, :, 0])
        values.index_put_(self.at, value_states[:, :, 0])
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
