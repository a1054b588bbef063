"""A thread beside training that spreads a stop to all ranks, and ends an attempt that hangs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from hpc_rlhf.train.runtime.stop_signals import REASON_OF_CODE, StopFlag

INTERVAL = 0.5  # seconds
# An attempt hangs when a rank has made no progress for this multiple of its longest pause so far, and for at
# least this many seconds.
HANG_FACTOR, MIN_HANG = 10.0, 1800.0
# Seconds for all ranks to write their stacks.
WRITING_STACKS = 5.0


@dataclass
class Heartbeat:
    """The progress of a rank.

    Attributes:
        last: time of the last beat, or None before training begins, because loading may take long.
        longest: longest gap between beats so far, in seconds.
    """

    last: float | None = None
    longest: float = 0.0

    def beat(self) -> None:
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last = now

    @property
    def overdue(self) -> float | None:
        """Seconds since the last beat if that is so long that the rank must hang, else None."""
        silence = 0.0 if self.last is None else time.monotonic() - self.last
        return silence if silence > max(MIN_HANG, HANG_FACTOR * self.longest) else None


class Watchdog:
    """Spreads a stop, and the end of a hanging attempt, over the ranks.

    A signal may reach one rank only, while another is deep in a rollout or in preparing data, where it waits
    for no other rank. Each rank therefore polls the key-value store through which the ranks met.

    Args:
        attempt: the attempt's name, the same on all ranks.
        out_of_time: called on each poll; whether the attempt's time is up.
        heartbeat: of this rank.
        on_hang: called with a message on the rank that is the first to notice a hang.
    """

    def __init__(
        self, flag: StopFlag, attempt: str, out_of_time: Callable[[], bool] = bool,
        heartbeat: Heartbeat | None = None, on_hang: Callable[[str], object] = bool,
    ) -> None:  # fmt: skip
        self.flag = flag
        self.out_of_time = out_of_time
        self.heartbeat = heartbeat or Heartbeat()
        self.on_hang = on_hang
        self._store = dist.PrefixStore(f"stop-{attempt}", dist.distributed_c10d._get_default_store())
        self._published = 0
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join()

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store is gone with rank 0; Slurm or a timeout ends the attempt
            while not self._finished.wait(INTERVAL):
                self.poll()

    def poll(self) -> None:
        """Publish a stop that is new here, pick up one that is new elsewhere, and look for a hang."""
        if self.out_of_time():
            self.flag.expire()
        if self.flag.code > self._published:
            self._published = self.flag.code
            self._store.set(str(self._published), "stop")
        for code in REASON_OF_CODE:
            if code > self.flag.code and self._store.check([str(code)]):
                self.flag.raise_to(code)
        overdue = self.heartbeat.overdue
        if overdue is not None and self._store.add("hang", 1) == 1:
            longest = f"its longest pause before was {self.heartbeat.longest:.0f} s"
            self.on_hang(f"rank {dist.get_rank()} has made no progress for {overdue:.0f} s; {longest}")
        if overdue is not None or self._store.check(["hang"]):
            self._abort()

    def _abort(self) -> None:
        """Write this rank's stacks and end it; the other ranks do the same at the same time."""
        print("hpc-rlhf: a rank hangs; the stacks of this rank are:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        # Rank 0 holds the store, and the first rank to end takes the others with it.
        time.sleep(WRITING_STACKS)
        os._exit(1)
