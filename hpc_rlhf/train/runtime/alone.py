"""Stands for the ranks of a run in a process of its own, without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Alone:
    """The only rank."""

    rank, size = 0, 1

    @staticmethod
    def on_main(make: Callable[[], T]) -> T:
        return make()

    @staticmethod
    def on_each(make: Callable[[], T]) -> list[T]:
        return [make()]
