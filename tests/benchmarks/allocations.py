"""Counts live tensor bytes in this process and their peak: what a GPU's allocator would hand out, measured on a CPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Counts each storage that an operation of this thread creates in this mode, until the storage is freed.

    Enter it before building anything: an earlier storage counts only once an operation returns it.
    What an operation frees before it returns, as scratch space inside a kernel, is not seen.

    Args:
        explained: record what is live from this many bytes on; None for never.

    Attributes:
        live: bytes of the live storages.
        peak: the maximum of live since the last reset.
        at_peak: bytes at the peak, by creating operation, element type and shape.
    """

    def __init__(self, explained: int | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.explained = explained
        self.at_peak: Counter[str] = Counter()
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[Any]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            real = isinstance(value, torch.Tensor) and value.device.type != "meta"
            if real and value.layout is torch.strided:
                self._count(value, str(func))
        return result

    def _count(self, value: torch.Tensor, maker: str) -> None:
        storage = value.untyped_storage()
        size = storage.nbytes()
        known = self._sizes.get(storage)
        if known is None:
            known = self._sizes[storage] = [0, maker, str(value.dtype), tuple(value.shape)]
            weakref.finalize(storage, self._free, known)
        self.live += size - known[0]  # a storage may have been resized
        known[0] = size
        if self.live > self.peak:
            self.peak = self.live
            if self.explained is not None and self.peak >= self.explained:
                self.at_peak = Counter()
                for held, *facts in list(self._sizes.values()):
                    self.at_peak[" ".join(map(str, facts))] += held

    def _free(self, known: list[Any]) -> None:
        self.live -= known[0]
