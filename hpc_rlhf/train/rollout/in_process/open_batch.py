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

# The least columns. Columns and rows are doubled until they are enough, so that their number seldom changes.
COLUMNS = 512


@dataclass(eq=False)
class Request:
    """A prompt to respond to, and the response as far as it has been drawn.

    Attributes:
        prompt: token ids, not empty.
        max_tokens: length of the longest response, EOS included.
        key: what seeds the sampling.
        tokens: the response's token ids.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    key: tuple[object, ...]
    tokens: list[int] = field(default_factory=list)
    randoms: Tensor | None = None  # (max_tokens,), the uniform numbers that tokens are drawn with; None if greedy

    @property
    def columns(self) -> int:
        return len(self.prompt) + self.max_tokens


class OpenBatch:
    """Responds to requests together, in the order in which they come.

    Up to rounding, a response depends only on its own request.

    Args:
        step: of a causal language model in eval mode.
        eos_id: the token that ends a response.
        tokens: how many tokens the caches may hold. A request must not need more columns than that.
    """

    def __init__(self, step: DecodeStep, eos_id: int, tokens: int) -> None:
        self.decode_step = step
        self.eos_id = eos_id
        self.budget = tokens
        self.waiting: deque[Request] = deque()
        self.live: list[Request] = []  # the request of each row
        self._rows: Rows | None = None
        self._room = self._columns = 0  # rows, and the columns of each
        self._ready = ExitStack()

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Stop responding to a request, if it is not finished."""
        if request in self.live:
            self._end(self.live.index(request))
        elif request in self.waiting:
            self.waiting.remove(request)

    def clear(self) -> None:
        """Forget all requests, and free the caches' memory."""
        self.waiting.clear()
        self.live.clear()
        self._rows, self._room, self._columns = None, 0, 0
        self._ready.close()

    def is_finished(self, request: Request) -> bool:
        return len(request.tokens) == request.max_tokens or request.tokens[-1:] == [self.eos_id]

    @torch.no_grad()
    def advance(self) -> list[Request]:
        """One forward pass: the requests to which it added a token; none if there is nothing to do."""
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
        """Take the requests whose prompts go through the model next."""
        if not self.waiting:
            return []
        columns = _doubled(COLUMNS, self.waiting[0].columns)
        if self.live or self.budget >= ROWS * self._columns:
            columns = max(columns, self._columns)
        columns = min(columns, self.budget)
        most = min(ROWS, self.budget // columns)
        if columns != self._columns or len(self.live) == self._room < most:
            if len(self.live) >= most:
                return []  # until enough of the others are finished
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
        """Make rows of another size, and let the live requests continue in them."""
        self._rows = None  # frees the memory first
        self._ready.close()
        self._rows, self._room, self._columns = make_rows(self.decode_step, rows, columns), rows, columns
        self._ready.enter_context(self.decode_step.ready())
        for row, request in enumerate(self.live):
            self._rows.begin(row, [request.prompt + request.tokens[:-1]])

    def _begin(self, first: int, new: list[Request]) -> Tensor:
        assert self._rows is not None
        for request in new:
            if not request.sampling.greedy:
                request.randoms = uniforms([request.key], request.max_tokens)[0]
        return self._rows.begin(first, [request.prompt for request in new])

    def _step(self) -> Tensor:
        assert self._rows is not None
        last = [request.tokens[-1] for request in self.live]
        return self._rows.step(torch.tensor(last, device=self.decode_step.model.device))

    def _end(self, row: int) -> None:
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
    while number < needed:
        number *= 2
    return number
