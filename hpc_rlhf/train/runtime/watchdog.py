"""A thread beside training: it tells all ranks what one was told, and ends an attempt that no longer moves."""

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

EVERY = 0.5  # seconds
# An attempt hangs when a rank has not moved for so many times as long as it ever took, and for so many seconds.
MULTIPLE, LEAST = 10.0, 1800.0
# Seconds in which all ranks write down where they are.
WRITING_STACKS = 5.0


@dataclass
class Pulse:
    """How a rank moves.

    Attributes:
        last: when it last did, or None before training has begun, when loading may take long.
        longest: seconds between two moves, at most so far.
    """

    last: float | None = None
    longest: float = 0.0

    def beat(self) -> None:
        """It moves."""
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last = now

    @property
    def silence(self) -> float | None:
        """Seconds without a move, where that is too long."""
        silence = 0.0 if self.last is None else time.monotonic() - self.last
        return silence if silence > max(LEAST, MULTIPLE * self.longest) else None


class Watch:
    """Spreads a stop over the ranks, and the end of one that hangs.

    A signal may reach one rank only, and another may be deep in a rollout or in preparing data, where it waits for
    nobody. Each rank looks twice a second at the key-value store in which the ranks met.

    Args:
        attempt: names the attempt; the same on all ranks.
        out_of_time: asked each time; whether the attempt's time is up.
        pulse: of this rank.
        hangs: told in a sentence of a hang, on the rank that is the first to see it.
    """

    def __init__(
        self, stop: StopFlag, attempt: str, out_of_time: Callable[[], bool] = bool,
        pulse: Pulse | None = None, hangs: Callable[[str], object] = bool,
    ) -> None:  # fmt: skip
        self.stop = stop
        self.out_of_time = out_of_time
        self.pulse = pulse or Pulse()
        self.hangs = hangs
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
        silence = self.pulse.silence
        if silence is not None and self._store.add("hang", 1) == 1:
            longest = f"the longest that it took before is {self.pulse.longest:.0f} s"
            self.hangs(f"rank {dist.get_rank()} has not moved for {silence:.0f} s; {longest}")
        if silence is not None or self._store.check(["hang"]):
            self._end()

    def _end(self) -> None:
        """Write down where this rank is, and end it; the others do so at the same time."""
        print("hpc-rlhf: a rank hangs; this is where this one is", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        time.sleep(WRITING_STACKS)  # rank 0 holds the store, and the first to end ends the others
        os._exit(1)
