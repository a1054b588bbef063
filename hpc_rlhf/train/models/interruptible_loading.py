"""Loading and writing of models that ends early when the attempt is to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.runtime.stop_control import StopControl
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled


@contextmanager
def interruptible(should_stop: Callable[[], bool]) -> Iterator[None]:
    """Within it, transformers stops loading or writing a model as soon as ``should_stop`` is true.

    transformers reports progress through a hook that sees each tensor or file; a version without it is not interrupted.

    Raises:
        WorkCancelled: ``should_stop`` was true.
    """
    from transformers.utils import logging

    set_hook = getattr(logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return

    def check_before_each(items: Any) -> Iterator[Any]:
        for item in items:
            if should_stop():
                raise WorkCancelled
            yield item

    def hook(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            return bar(**kwargs)
        items, *others = args
        return bar(check_before_each(items), *others, **kwargs)

    previous = set_hook(hook)
    try:
        yield
    finally:
        set_hook(previous)


@contextmanager
def loading(stop: StopControl, ds_config: dict[str, Any]) -> Iterator[None]:
    """Load a model, sharded if DeepSpeed is configured so. Collective; see ``StopControl.check``.

    A load that fails while this rank has to stop counts as cancelled: the files it needs may be going down
    with the node.

    Two kinds of loading are not interrupted; if they are killed, no training is lost. ZeRO-3 loads on all
    ranks together (13B in bf16 take 13 to 26 s at 1 to 2 GB/s) and stops before the next model. A download
    from a hub may take minutes; files that are complete are kept for the next attempt.
    """
    stop.check()

    def should_stop() -> bool:  # without a heartbeat, which would start the watchdog's clock
        return stop.flag.code > 0

    sharded = ds_config["zero_optimization"]["stage"] == 3
    try:
        with engines.sharded_loading(ds_config), interruptible(bool if sharded else should_stop):
            yield
    except Exception:
        if not should_stop():
            raise
    stop.check()
