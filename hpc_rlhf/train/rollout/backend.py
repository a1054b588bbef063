"""The extension point for rollouts: a request for responses, the responses, and the backends that generate them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_rlhf.spec.sizes import ROWS
from hpc_rlhf.train import ragged
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits.
        top_p: keeps the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        greedy: always take the likeliest token and ignore the rest.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts to answer, and how.

    Attributes:
        prompts: token ids, none empty.
        max_new_tokens: length of the longest response, EOS included.
        eos_id: the token that ends a response.
        keys: what seeds the sampling of each response; None if greedy.
        max_batch: prompts that are answered at the same time, at most.
        should_stop: polled between forward passes; True cancels the rollout.
        group_size: each run of this many prompts is one prompt, repeated, which a backend needs to read only once.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    eos_id: int
    sampling: Sampling = field(default_factory=Sampling)
    keys: Sequence[tuple[object, ...]] | None = None
    max_batch: int = ROWS
    should_stop: Callable[[], bool] = bool
    group_size: int = 1

    def __post_init__(self) -> None:
        for row, prompt in enumerate(self.prompts if self.group_size > 1 else ()):
            first = self.prompts[row - row % self.group_size]
            assert prompt is first or list(prompt) == list(first), "a group has different prompts"


@dataclass(frozen=True)
class Rollout:
    """Prompts with their responses. A response ends with EOS unless it was cut off, and is never empty.

    Attributes:
        sequences: each prompt followed by its response.
        response_lengths: tokens of each response.
        log_probs: (response tokens,), float32, the sampled tokens' log-probabilities when they were drawn;
            None if the backend does not have them.
    """

    sequences: Ragged
    response_lengths: tuple[int, ...]
    log_probs: Tensor | None = None

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device | None = None,
        log_probs: Sequence[Sequence[float]] | None = None,
    ) -> Rollout:  # fmt: skip
        sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        flat = None
        if log_probs is not None:
            flat = torch.tensor([number for row in log_probs for number in row], dtype=torch.float32, device=device)
        return cls(Ragged.of(sequences, device), tuple(map(len, responses)), flat)

    def __len__(self) -> int:
        return len(self.response_lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt with its response."""
        return self.sequences.lengths

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Ragged, Tensor]:
        """Some sequences, packed, and the indices of their response tokens: (response tokens,), int64."""
        batch = self.sequences.select(rows)
        batch = Ragged(batch.ids.to(device), batch.lengths)
        return batch, batch.tail([self.response_lengths[row] for row in rows])

    def mask(self, device: torch.device) -> Tensor:
        """(batch, response), bool; True on real response tokens, EOS included."""
        return ragged.mask(self.response_lengths, device)

    def ended(self, eos_id: int, device: torch.device) -> Tensor:
        """(batch,), bool; True where the response ended with EOS."""
        lasts = self.sequences.tail([1] * len(self))
        return (self.sequences.ids[lasts] == eos_id).to(device)

    @cached_property
    def prompts(self) -> list[list[int]]:
        rows = zip(self.sequences.rows(), self.response_lengths, strict=True)
        return [row[: len(row) - length] for row, length in rows]

    @cached_property
    def responses(self) -> list[list[int]]:
        rows = zip(self.sequences.rows(), self.response_lengths, strict=True)
        return [row[len(row) - length :] for row, length in rows]

    @cached_property
    def response_log_probs(self) -> list[list[float]] | None:
        """``log_probs`` of each response."""
        if self.log_probs is None:
            return None
        return [row.tolist() for row in self.log_probs.split(list(self.response_lengths))]


# A response's tokens, and the log-probability each was drawn with.
Response = tuple[Sequence[int], Sequence[float]]


class RolloutCancelled(WorkCancelled):
    """Generation stopped because the attempt must stop; the rollout has to be repeated."""


class RolloutBackend(Protocol):
    """Generates responses. All methods are collective over the ranks that share the model."""

    def sync_weights(self, model: Any) -> None:
        """Make the next rollout use the model's current weights.

        Args:
            model: the transformers model inside the training engine.
        """

    def generate(self, request: GenerationRequest) -> Rollout:
        """A response to each of this rank's prompts.

        Raises:
            RolloutCancelled: ``request.should_stop`` returned True.
        """
