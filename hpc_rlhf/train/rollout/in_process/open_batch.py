"""A batch of responses that requests join and leave at any time, each with its own sampling and length."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpc_rlhf.spec.sizes import ROWS
from hpc_rlhf.train.rollout.backend import Sampling
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.decoding import PREFILL_TOKENS, draw, uniforms
from hpc_rlhf.train.rollout.in_process.kv_cache import Rows, make_rows

# The fewest columns. Columns and rows are doubled until they suffice, so that the buffers seldom change their size.
COLUMNS = 512


@dataclass(eq=False)
class Request:
    """A prompt to respond to, and the response as far as it has been drawn.

    Attributes:
        prompt: token ids, not empty.
        max_tokens: length of the longest response, EOS included.
        key: seeds the sampling.
        tokens: the response's token ids.
        randoms: (max_tokens,), the uniform numbers that tokens are drawn with; None if greedy, or not begun.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    key: tuple[object, ...]
    tokens: list[int] = field(default_factory=list)
    randoms: Tensor | None = None

    @property
    def columns(self) -> int:
        """The most tokens of prompt and response."""
        return len(self.prompt) + self.max_tokens


class OpenBatch:
    """Draws responses together, and begins requests in the order in which they were added.

    Up to rounding, a response depends only on its own request.

    Args:
        step: of a causal language model in eval mode.
        eos_id: the token that ends a response.
        tokens: how many tokens the caches may hold, all rows together. No request may need more.

    Attributes:
        budget: ``tokens``.
        waiting: the requests that have no row yet.
        live: the request of each row.
    """

    def __init__(self, step: DecodeStep, eos_id: int, tokens: int) -> None:
        self.decode_step = step
        self.eos_id = eos_id
        self.budget = tokens
        self.waiting: deque[Request] = deque()
        self.live: list[Request] = []
        self._rows: Rows | None = None
        self._room = self._columns = 0  # rows, and the columns of each
        self._ready = ExitStack()

    def add(self, request: Request) -> None:
        """Let a request wait for a row."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Stop responding to a request, if it is not finished."""
        if request in self.live:
            self._end(self.live.index(request))
        elif request in self.waiting:
            self.waiting.remove(request)

    def clear(self) -> None:
        """Drop all requests, and free the memory of the caches."""
        self.waiting.clear()
        self.live.clear()
        self._rows, self._room, self._columns = None, 0, 0
        self._ready.close()

    def is_finished(self, request: Request) -> bool:
        """Whether a response has ended, by EOS or by its length."""
        return len(request.tokens) == request.max_tokens or request.tokens[-1:] == [self.eos_id]

    @torch.no_grad()
    def advance(self) -> list[Request]:
        """Make one forward pass, and return the requests to which it added a token; none if there was no request."""
        first, new = len(self.live), self._next_requests()
        if new:
            logits = self._begin(first, new)
            self.live += new
        elif self.live:
            first = 0
            logits = self._step()
        else:
            return []
        advanced = self.live[first:]
        for request, token in zip(advanced, _draw(logits, advanced), strict=True):
            request.tokens.append(token)
        for row in reversed(range(first, len(self.live))):
            if self.is_finished(self.live[row]):
                self._end(row)
        return advanced

    def _next_requests(self) -> list[Request]:
        """Remove from the waiting requests those whose prompts go through the model next."""
        if not self.waiting:
            return []
        columns = _doubled(COLUMNS, self.waiting[0].columns)
        if self.live or self.budget >= ROWS * self._columns:
            columns = max(columns, self._columns)
        columns = min(columns, self.budget)
        most = min(ROWS, self.budget // columns)
        if columns != self._columns or len(self.live) == self._room < most:
            if len(self.live) >= most:
                return []  # until enough live requests have ended
            self._replace_rows(min(most, _doubled(1, len(self.live) + len(self.waiting))), columns)
        new: list[Request] = []
        tokens = 0
        while self.waiting and len(self.live) + len(new) < self._room:
            request = self.waiting[0]
            tokens += len(request.prompt)
            if request.columns > self._columns or (new and tokens > PREFILL_TOKENS):
                break
            new.append(self.waiting.popleft())
        return new

    def _replace_rows(self, rows: int, columns: int) -> None:
        """Make new rows, ``rows`` of ``columns`` each, and continue the live requests in them."""
        self._rows = None  # frees the memory first
        self._ready.close()
        self._rows, self._room, self._columns = make_rows(self.decode_step, rows, columns), rows, columns
        self._ready.enter_context(self.decode_step.ready())
        for row, request in enumerate(self.live):
            self._rows.begin(row, [request.prompt + request.tokens[:-1]])

    def _begin(self, first: int, new: list[Request]) -> Tensor:
        """The next logits, (new, vocabulary), of requests in the rows from ``first`` on."""
        assert self._rows is not None
        for request in new:
            if not request.sampling.greedy:
                request.randoms = uniforms([request.key], request.max_tokens)[0]
        return self._rows.begin(first, [request.prompt for request in new])

    def _step(self) -> Tensor:
        """The next logits, (live, vocabulary)."""
        assert self._rows is not None
        last = [request.tokens[-1] for request in self.live]
        return self._rows.step(torch.tensor(last, device=self.decode_step.model.device))

    def _end(self, row: int) -> None:
        """Drop a row's request, and move the last row into its place."""
        end = len(self.live) - 1
        if row < end:
            assert self._rows is not None
            self._rows.move(end, row)
            self.live[row] = self.live[end]
        del self.live[end]


def _draw(logits: Tensor, requests: list[Request]) -> list[int]:
    """The next token of each request, from logits (requests, vocabulary)."""
    tokens = [0] * len(requests)
    for sampling in {request.sampling for request in requests}:
        alike = [row for row, request in enumerate(requests) if request.sampling == sampling]
        numbers = [0.0 if (it := requests[row]).randoms is None else float(it.randoms[len(it.tokens)]) for row in alike]
        uniform = None if sampling.greedy else torch.tensor(numbers, dtype=torch.float64, device=logits.device)
        drawn = draw(logits[alike], uniform, sampling.temperature, sampling.top_p, sampling.top_k)
        for row, token in zip(alike, drawn.tolist(), strict=True):
            tokens[row] = token
    return tokens


def _doubled(number: int, needed: int) -> int:
    """The number, doubled until it is at least ``needed``."""
    while number < needed:
        number *= 2
    return number
