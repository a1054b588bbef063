"""Ranks that are threads of this process, and a tokenizer for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

import torch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.runtime.world import ParallelDims, World

T = TypeVar("T")


class Letters:
    """A tokenizer of which a token is a character's number; 0 is special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in ids if token)


def ids(*texts: str) -> list[list[int]]:
    return [[ord(letter) for letter in text] + [0] for text in texts]


@dataclass
class _Shared:
    barrier: Barrier
    values: list[Any]


@dataclass(frozen=True)
class Thread(World):
    """A rank that is a thread of this process; its messages make the same round trip through JSON."""

    shared: Any = field(default=None, kw_only=True)

    def gather(self, value: T) -> list[T]:
        self.shared.values[self.rank] = json.dumps(value)
        self.shared.barrier.wait(timeout=30)
        values = [json.loads(text) for text in self.shared.values]
        self.shared.barrier.wait(timeout=30)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        return list(map(max, *self.gather(list(numbers)), [0] * len(numbers)))

    def on_main(self, make: Callable[[], T]) -> T:
        value, error = None, None
        if self.is_main:
            try:
                value = make()
            except HpcRlhfError as refused:
                error = str(refused)
        (value, error), *_ = self.gather((value, error))
        if error is not None:
            raise HpcRlhfError(error)
        return value  # type: ignore[return-value]


def on_ranks(count: int, work: Callable[[World], T], tensor: int = 1) -> list[T | Exception]:
    """What each of some ranks returns, or raises."""
    shared = _Shared(Barrier(count), [None] * count)

    def run(rank: int) -> T | Exception:
        world = Thread(rank, ParallelDims.of(count, tensor), torch.device("cpu"), None, shared=shared)
        try:
            return work(world)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def alone(work: Callable[[World], T]) -> T:
    (result,) = on_ranks(1, work)
    if isinstance(result, Exception):
        raise result
    return result
