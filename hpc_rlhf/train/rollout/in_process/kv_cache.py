"""The rows of a batch during decoding: their keys and values, and the forward passes that add to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hpc_rlhf.spec.sizes import ALIGNED
from hpc_rlhf.train import ragged
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep

# Attention covers a multiple of this many columns, masked past a row's end, so that shapes seldom change.
COLUMN_STEP = 32

# Config fields that limit how far back some layers attend.
WINDOWS = ("sliding_window", "attention_chunk_size")


def make_rows(step: DecodeStep, rows: int, columns: int) -> BatchedRows | SingleRows:
    """Space for a number of rows of at most ``columns`` tokens."""
    config = step.model.config.get_text_config()
    windows = [getattr(config, field, None) or columns for field in WINDOWS]
    if step.model.config._attn_implementation == packed_attention.NAME and columns <= min(windows):
        return BatchedRows(step, rows, columns)
    return SingleRows(step.model)


class BatchedRows:
    """Rows 0, 1, … of a batch, each a prompt and the tokens drawn for it, that share every forward pass.

    A row's tokens are in columns 0, 1, … of one buffer per layer, so that a new prompt can replace a finished
    row, whatever the lengths of the others. Prompts go through the model packed, without padding.
    """

    def __init__(self, step: DecodeStep, rows: int, columns: int) -> None:
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

    def move(self, source: int, target: int) -> None:
        """Replace a row by another."""
        self.sizes[target] = self.sizes[source]
        for buffer in (*self.keys, *self.values, self.mask, self.ends):
            buffer[target] = buffer[source]

    def write(self, layer: int, keys: Tensor, values: Tensor, at: tuple[Tensor, Tensor]) -> None:
        """Store a layer's keys and values (1, heads, tokens, dim) of prompts in rows and columns ``at``."""
        for buffers, new in ((self.keys, keys), (self.values, values)):
            if layer == len(buffers):
                buffers.append(new.new_zeros(len(self.sizes), self.columns, new.shape[1], new.shape[3]))
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
    """Rows that go through the model one by one, if packed rows do not support its attention."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.caches: dict[int, Any] = {}

    def begin(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits = []
        for row, prompt in enumerate(prompts, first):
            self.caches[row] = DynamicCache(config=self.model.config)
            logits.append(self._call(row, torch.tensor(prompt, device=self.model.device)))
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        return torch.cat([self._call(row, tokens[row : row + 1]) for row in range(len(tokens))])

    def move(self, source: int, target: int) -> None:
        self.caches[target] = self.caches.pop(source)

    def _call(self, row: int, tokens: Tensor) -> Tensor:
        output = self.model(input_ids=tokens.unsqueeze(0), past_key_values=self.caches[row], use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits
