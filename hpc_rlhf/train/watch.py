"""A thread beside training that tells all ranks what one was told, wherever each of them is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from hpc_rlhf.train.preemption import REASON_OF_CODE, StopFlag

EVERY = 0.5  # seconds


class Watch:
    """Spreads a stop over the ranks.

    A signal may reach one rank only, and another may be deep in a rollout or in preparing data, where it waits for
    nobody. Each rank looks twice a second at the key-value store in which the ranks met.

    Args:
        attempt: names the attempt; the same on all ranks.
        out_of_time: asked each time; whether the attempt's time is up.
    """

    def __init__(self, stop: StopFlag, attempt: str, out_of_time: Callable[[], bool] = bool) -> None:
        self.stop = stop
        self.out_of_time = out_of_time
        self._store = dist.PrefixStore(f"told-{attempt}", dist.distributed_c10d._get_default_store())
        self._told = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store is gone: the attempt is at its end
            while not self._over.wait(EVERY):
                self.look()

    def look(self) -> None:
        """Tell what is new here, and hear what is new elsewhere."""
        if self.out_of_time():
            self.stop.time_is_up()
        if self.stop.code > self._told:
            self._told = self.stop.code
            self._store.set(str(self._told), "told")
        for code in REASON_OF_CODE:
            if code > self.stop.code and self._store.check([str(code)]):
                self.stop.hear_of(code)
