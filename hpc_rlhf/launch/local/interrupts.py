"""Counts the signals that ask a launcher to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from hpc_rlhf.errors import HpcRlhfError


class Interrupted(HpcRlhfError):
    """The user or the machine asked the run to stop."""


@dataclass
class StopRequests:
    """Counts the signals that ask this process to stop; the handler does nothing else."""

    count: int = 0
    number: int = 0

    @contextmanager
    def listening(self) -> Iterator[StopRequests]:
        # Ignored signals stay ignored: nohup's SIGHUP, and a background job's SIGINT.
        numbers = [
            number
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN
        ]
        before = {number: signal.signal(number, self._count) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.number = number
