"""The rows of a batch during decoding: their keys and values, and the forward passes that add to them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from hpc_rlhf.spec.sizes import ALIGNED
from hpc_rlhf.train import ragged
from hpc_rlhf.train.models import packed_attention, rotary
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep

# Attention covers a multiple of this many columns, masked past a row's end, so that shapes seldom change.
COLUMN_STEP = 32

# Config fields that limit how far back some layers attend.
WINDOWS = ("sliding_window", "attention_chunk_size")


# What architectures call the cache that they make, in their output and in the next step's arguments.
CACHES = ("past_key_values", "cache_params", "state")


def may_batch(model: Any, columns: int) -> bool:
    """True if prompts may be packed and rows share passes, as far as the architecture is known."""
    config = model.config.get_text_config()
    windows = [getattr(config, field, None) or columns for field in WINDOWS]
    return packed_attention.is_enabled(model) and columns <= min(windows)


def make_rows(step: DecodeStep, rows: int, columns: int, before: Callable[[], object] = lambda: None) -> Rows:
    """Space for a number of rows of at most ``columns`` tokens.

    Args:
        before: called before each forward pass but the first of ``begin`` or ``step``.
    """
    switch = rotary.switch_length(step.model.config)
    if switch is not None and columns > switch:  # a cache would keep keys with the frequencies of a shorter sequence
        return WholeRows(step, rows, columns, before)
    ways = (BatchedRows, SingleRows) if step.ways is None else step.ways
    if BatchedRows in ways and may_batch(step.model, columns):
        return BatchedRows(step, rows, columns)
    return (SingleRows if SingleRows in ways else WholeRows)(step, rows, columns, before)


class BatchedRows:
    """Rows 0, 1, … of a batch, each a prompt and the tokens drawn for it, that share every forward pass.

    A row's tokens are in columns 0, 1, … of one buffer per layer, so that a new prompt can replace a finished
    row, whatever the lengths of the others. Prompts go through the model packed, without padding.
    """

    def __init__(self, step: DecodeStep, rows: int, columns: int, before: Callable[[], object] = lambda: None) -> None:
        self.decode_step = step
        self.model = step.model
        self.sizes = [0] * rows  # tokens in each row
        self.ends = torch.zeros(rows, dtype=torch.int64, device=self.model.device)  # the same
        self.rows = torch.arange(rows, device=self.model.device)
        self.tokens = torch.zeros_like(self.rows)  # where a recorded step reads them
        self.columns = _round_up(columns)
        shape, device = (rows, self.columns), self.model.device
        self.mask = torch.full(shape, -torch.inf, dtype=self.model.dtype, device=device)
        self.visible = self.mask.new_zeros(())
        self.keys: list[Tensor] = []  # (rows, columns, heads, dim) of each layer
        self.values: list[Tensor] = []
        self._shown: list[Tensor] = []  # the part of mask, keys and values that a step sees

    def begin(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Put prompts into rows from ``first`` on; gives the next tokens' logits (prompts, vocabulary)."""
        batch = ragged.Ragged.of(prompts, self.model.device)
        tokens = torch.tensor(batch.lengths, device=self.model.device)
        last = tokens.cumsum(0) - 1
        new = slice(first, first + len(prompts))
        rows = self.rows[new].repeat_interleave(tokens)
        places = ragged.positions(batch.lengths, self.model.device)
        self.sizes[new] = batch.lengths
        self.ends[new] = tokens
        self.mask[new] = -torch.inf
        self.mask.index_put_((rows, places), self.visible)
        spare = -len(batch.ids) % ALIGNED  # padding: one more sequence, which is discarded
        logits = self.model(
            input_ids=F.pad(batch.ids, (0, spare)).unsqueeze(0),
            position_ids=F.pad(places, (0, spare)).unsqueeze(0),
            past_key_values=_PromptCache(self, rows, places), use_cache=True,
            packed_lengths=(*batch.lengths, spare) if spare else batch.lengths,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=places.device),  # unused
            **({"logits_to_keep": last} if self.decode_step.last_only else {}),
        ).logits[0]  # fmt: skip
        return logits if self.decode_step.last_only else logits[last]

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token (rows,) to each of the first rows; gives the next logits (rows, vocabulary)."""
        live = len(tokens)
        self.sizes[:live] = [size + 1 for size in self.sizes[:live]]
        recorded = self.decode_step.recorded
        taken = live if recorded is None else recorded.rows(live, len(self.sizes))
        if recorded is not None:
            self.tokens[:live] = tokens
            tokens = self.tokens[:taken]
            # Unused rows hold one token, which the first token of a prompt will overwrite.
            self.ends[live:taken] = 0
        shape = (taken, _round_up(max(self.sizes[:live])))
        if not self._shown or self._shown[0].shape != shape:
            self._shown = [whole[:taken, : shape[1]] for whole in (self.mask, *self.keys, *self.values)]
        rows, ends = self.rows[:taken], self.ends[:taken]
        self.mask.index_put_((rows, ends), self.visible)
        logits = self.decode_step.take(tokens, rows, ends, *self._shown)
        ends[:live] += 1
        return logits[:live]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Replace rows by copies of others."""
        used = max(self.sizes[source] for source in sources)
        old, new = (torch.tensor(rows, device=self.model.device) for rows in (sources, targets))
        for buffer in (*self.keys, *self.values):
            buffer[new, :used] = buffer[old, :used]
        self.mask[new], self.ends[new] = self.mask[old], self.ends[old]
        for source, target in zip(sources, targets, strict=True):
            self.sizes[target] = self.sizes[source]

    def move(self, source: int, target: int) -> None:
        """Replace a row by another."""
        self.sizes[target] = self.sizes[source]
        for buffer in (*self.keys, *self.values, self.mask, self.ends):
            buffer[target] = buffer[source]

    def write(self, layer: int, keys: Tensor, values: Tensor, at: tuple[Tensor, Tensor]) -> None:
        """Store a layer's keys and values (1, heads, tokens, dim) of prompts in rows and columns ``at``."""
        for buffers, new in ((self.keys, keys), (self.values, values)):
            if layer == len(buffers):
                # Heads before columns in memory, which attention reads fastest.
                shape = (len(self.sizes), new.shape[1], self.columns, new.shape[3])
                buffers.append(new.new_zeros(shape).transpose(1, 2))
            buffers[layer].index_put_(at, new[0, :, : len(at[0])].transpose(0, 1))


def _round_up(columns: int) -> int:
    return -(-columns // COLUMN_STEP) * COLUMN_STEP


class _PromptCache(Cache):
    """Stores the prompts' keys and values of a layer; the prompts attend to themselves."""

    def __init__(self, target: BatchedRows, rows: Tensor, columns: Tensor) -> None:
        super().__init__(layers=[])
        self.target = target
        self.at = (rows, columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.target.write(layer_idx, key_states, value_states, self.at)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class SingleRows:
    """Rows that go through the model one by one, each with the cache that the architecture makes for it."""

    def __init__(self, step: DecodeStep, rows: int, columns: int, before: Callable[[], object] = lambda: None) -> None:
        self.model = step.model
        self.before = before
        self.caches: dict[int, dict[str, Any]] = {}  # of each row, as an argument of the model
        self.sizes: dict[int, int] = {}
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters

    def begin(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        for row in range(first, first + len(prompts)):
            self.caches[row], self.sizes[row] = {}, 0
        tokens = [torch.tensor(prompt, device=self.model.device) for prompt in prompts]
        return self._calls(list(enumerate(tokens, first)))

    def step(self, tokens: Tensor) -> Tensor:
        return self._calls(list(enumerate(tokens.split(1))))

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self.caches[target], self.sizes[target] = copy.deepcopy(self.caches[source]), self.sizes[source]

    def move(self, source: int, target: int) -> None:
        self.caches[target], self.sizes[target] = self.caches.pop(source), self.sizes.pop(source)

    def _calls(self, rows: Sequence[tuple[int, Tensor]]) -> Tensor:
        logits = []
        for number, (row, tokens) in enumerate(rows):
            if number:  # the first forward pass has been announced
                self.before()
            logits.append(self._call(row, tokens))
        return torch.cat(logits)

    def _call(self, row: int, tokens: Tensor) -> Tensor:
        start = self.sizes[row]
        self.sizes[row] += len(tokens)
        positions = torch.arange(start, self.sizes[row], device=tokens.device).unsqueeze(0)
        output = self.model(
            input_ids=tokens.unsqueeze(0), use_cache=True, **self.caches[row],
            **({"position_ids": positions} if self.takes_positions else {}),
        )  # fmt: skip
        self.caches[row] = {name: output[name] for name in CACHES if output.get(name) is not None}
        logits: Tensor = output.logits[:, -1]
        return logits


class WholeRows(SingleRows):
    """Rows that go through the model whole for each token: slow, and right for every architecture."""

    def __init__(self, step: DecodeStep, rows: int, columns: int, before: Callable[[], object] = lambda: None) -> None:
        super().__init__(step, rows, columns, before)
        self.tokens: dict[int, Tensor] = {}

    def begin(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        for row, prompt in enumerate(prompts, first):
            self.tokens[row] = torch.tensor(prompt, device=self.model.device)
        return self._calls([(row, self.tokens[row]) for row in range(first, first + len(prompts))])

    def step(self, tokens: Tensor) -> Tensor:
        for row, token in enumerate(tokens.split(1)):
            self.tokens[row] = torch.cat([self.tokens[row], token])
        return self._calls([(row, self.tokens[row]) for row in range(len(tokens))])

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self.tokens[target] = self.tokens[source]

    def move(self, source: int, target: int) -> None:
        self.tokens[target] = self.tokens.pop(source)

    def _call(self, row: int, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[:, -1]
        return logits


Rows = BatchedRows | SingleRows
