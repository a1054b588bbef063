"""Ask between the tensors that transformers loads, and the files that it writes, whether to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpc_rlhf.train.runtime.stop_signals import Interrupted


@contextmanager
def asking(told: Callable[[], bool]) -> Iterator[None]:
    """Within it, what transformers loads or writes is dropped as soon as ``told`` says so.

    transformers shows its progress by a hook that sees each tensor or file; a version without it drops nothing.

    Raises:
        Interrupted: ``told`` said so.
    """
    from transformers.utils import logging

    set_hook = getattr(logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return

    def ask_before_each(pieces: Any) -> Iterator[Any]:
        for piece in pieces:
            if told():
                raise Interrupted
            yield piece

    def hook(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            return bar(**kwargs)
        pieces, *others = args
        return bar(ask_before_each(pieces), *others, **kwargs)

    before = set_hook(hook)
    try:
        yield
    finally:
        set_hook(before)
