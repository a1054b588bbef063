"""A process that shares a socket and a piece of memory with this one, both without a name, and ends with it."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence

from hpc_rlhf import safe_path
from hpc_rlhf.train.runtime import keeper


class Process:
    """A program of this folder, which must continue in a child of a ``keeper``.

    Args:
        program: its name and first arguments. The last two are the descriptors of its socket and the memory.
        size: bytes of the memory.
        environment: more variables.

    Attributes:
        popen: with its output as a pipe.
    """

    def __init__(self, program: Sequence[str], size: int, environment: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair()
        descriptor = os.memfd_create("weights")
        os.ftruncate(descriptor, size)
        self.memory = mmap.mmap(descriptor, size)
        name, *words = program
        command = safe_path.module(
            f"hpc_rlhf.train.rollout.vllm.{name}", *words, str(theirs.fileno()), str(descriptor)
        )  # fmt: skip
        before = signal.pthread_sigmask(signal.SIG_BLOCK, keeper.RANK_SIGNALS)
        try:
            self.popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno(), descriptor], start_new_session=True, env={**os.environ, **environment},
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            os.close(descriptor)

    def end(self) -> None:
        """Kill it and all that it started."""
        self.socket.close()
        keeper.end(self.popen)
