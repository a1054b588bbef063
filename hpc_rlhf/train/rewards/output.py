"""What a process that runs a user's code prints: passed on to the log of the rank, until it is too much for one."""

from __future__ import annotations

import os
from contextlib import suppress

# Bytes that are passed on, in all.
LIMIT = 64 * 1024
_LEFT_OUT = b"\nhpc-rlhf: what the reward prints from here on is left out\n"
# At least what a pipe holds.
_PART = 1 << 20


class Output:
    """A pipe for what one process prints, or several one after the other.

    Attributes:
        reader, writer: its ends.
        tail: the end of what was printed since the last ``clear``.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.tail, self._left = b"", LIMIT

    def clear(self) -> None:
        """Forget the tail."""
        self.tail = b""

    def pass_on(self) -> None:
        """Write what is in the pipe to standard error."""
        printed = b""
        with suppress(BlockingIOError):
            printed = os.read(self.reader, _PART)
        self.tail = (self.tail + printed)[-LIMIT:]
        if printed and self._left:
            os.write(2, printed[: self._left] + _LEFT_OUT * (len(printed) > self._left))
            self._left = max(0, self._left - len(printed))

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)
