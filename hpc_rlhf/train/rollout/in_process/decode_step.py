"""A decode step: one token of each row through a model, over the keys and values of those before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hpc_rlhf.train.models import cpu_kernels
from hpc_rlhf.train.models.cpu_kernels import Place
from hpc_rlhf.train.rollout.in_process import cuda_graphs
from hpc_rlhf.train.rollout.in_process.cpu_decode import PackedLinear, pack_layers, places, traced

# Decode steps before one is traced, and steps in which the trace must then give the model's bits.
TRACED_AFTER = 64
TRIAL_STEPS = 32
# Rotary embeddings that switch at some length; a trace would fix one choice.
CHANGING_ROPE = ("dynamic", "longrope")


class DecodeStep:
    """A model's decode step as a function of tensors alone.

    On a CPU it uses ``cpu_decode``: a trace is used once it has given the model's bits for some steps, and
    never if it differs. On a GPU it uses ``cuda_graphs``.

    Args:
        model: a causal language model that accepts a four-dimensional mask.
        may_trace: no Python of the model would be lost in a trace, and its weights stay in place within ``ready``.
    """

    def __init__(self, model: Any, may_trace: bool = False) -> None:
        self.model = model
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if keeps else {}
        self.may_trace = may_trace
        self.ways: tuple[type, ...] | None = None  # kinds of rows that ``trial`` has found right
        fixed = not any(kind in str(getattr(model.config, "rope_parameters", "")) for kind in CHANGING_ROPE)
        self.steps_to_trace = TRACED_AFTER if may_trace and fixed else -1
        self.may_record = may_trace and fixed
        self.recorded: cuda_graphs.RecordedSteps | None = None  # of this rollout
        self.trial_steps = TRIAL_STEPS
        self.packed: list[PackedLinear] | None = None  # None until the first use
        self.trace: Callable[..., Tensor] | None = None
        self.places: list[Place] = []  # where the weights that the trace takes are kept
        self.weights: list[Any] = []  # those weights, within ``ready``

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it, the model's weights do not change, and steps may be taken."""
        recorder = cuda_graphs.recorder(self.model.device) if self.may_record else None
        if recorder is not None:
            self.recorded = cuda_graphs.RecordedSteps(self.forward, recorder)
            try:
                yield
            finally:
                self.may_record = not self.recorded.failed
                self.recorded.close()
                self.recorded = None
            return
        if not self.may_trace or self.model.device.type != "cpu" or not cpu_kernels.enabled():
            yield
            return
        if self.packed is None:
            self.packed = pack_layers(self.model)
        try:
            for linear in self.packed:
                linear.fill()
            self.weights = [holder[name] for holder, name in self.places]
            # The optimizer would change a trace's arithmetic after some calls.
            with torch.jit.optimized_execution(False):
                yield
        finally:
            self.weights = []
            for linear in self.packed:
                linear.clear()

    def forward(self, tokens: Tensor, rows: Tensor, places: Tensor, mask: Tensor, *buffers: Tensor) -> Tensor:
        """Logits of the next tokens: (rows, vocabulary).

        Args:
            tokens: (rows,), int64.
            rows, places: (rows,), int64; where the tokens' keys and values go in the buffers. A place is a position.
            mask: (rows, columns), 0 where a row may attend, its own place included, and -inf elsewhere.
            buffers: (rows, columns, heads, dim); the keys of all layers, then their values.
        """
        output = self.model(
            input_ids=tokens.unsqueeze(1), position_ids=places.unsqueeze(1),
            attention_mask=mask[:, None, None],
            past_key_values=_StepCache(buffers, rows, places), use_cache=True, **self.last_only,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits

    def take(self, *inputs: Tensor) -> Tensor:
        """The same as ``forward``, by a trace or a recording if there is one."""
        if self.recorded is not None:
            return self.recorded.take(*inputs)
        if self.steps_to_trace == 0 and inputs[0].device.type == "cpu" and cpu_kernels.enabled():
            self._trace(inputs)
        self.steps_to_trace -= 1
        if self.trace is None:
            return self.forward(*inputs)
        logits = self.trace(*inputs, *self.weights)
        if self.trial_steps > 0:
            self.trial_steps -= 1
            expected = self.forward(*inputs)
            if not torch.equal(logits, expected):
                self.trace = None
            return expected
        return logits

    def _trace(self, inputs: Sequence[Tensor]) -> None:
        self.places = places(self.model, self.packed or [])
        self.weights = [holder[name] for holder, name in self.places]
        try:
            trace = traced(self.forward, _example(inputs, 2, 1), self.places)
            for rows, place in ((1, 0), (3, inputs[4].shape[1] - 1), (2, 40)):
                example = _example(inputs, rows, min(place, int(inputs[2].max())))
                if not torch.equal(trace(*example, *self.weights), self.forward(*example)):
                    return
        except Exception:  # any kind: the model does something that a trace cannot follow
            return
        self.trace = trace


def _example(inputs: Sequence[Tensor], rows: int, place: int) -> tuple[Tensor, ...]:
    """Inputs of the same kinds for ``rows`` rows whose next token is at ``place``."""
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
    """Adds each row's token to the buffers of a layer, and gives the layer the buffers to attend over."""

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
