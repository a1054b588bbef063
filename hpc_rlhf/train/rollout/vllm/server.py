"""A process with vLLM's engine, and what a rank says to it.

The rank and the process share a pair of sockets and a piece of memory for weights, both without a name: there is no
address that anybody else could connect to, nor a key that could become known. The process ends with the rank. On
another node, ``bridge`` stands for it here.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

import torch
from torch import Tensor

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import reasons
from hpc_rlhf.train.rollout.vllm.inside.hpc_rlhf_vllm import Connection
from hpc_rlhf.train.rollout.vllm.process import Process
from hpc_rlhf.train.runtime import keeper

# To start, on a busy file system, and between two signs of life later.
START_SECONDS, SILENCE_SECONDS = 1800.0, 600.0
# For a process that has ended its output to end.
_END_SECONDS = 10.0
# Tensors in the memory begin at multiples of this.
_ALIGNMENT = 64


class Server:
    """A server of one rank. One question at a time: ``ask``, and then ``poll`` until there is an answer.

    The first answer comes without a question, once the engine has started. What the server writes appears in the log of
    the rank.

    Args:
        program: start with vLLM's own Python, or bridge with its arguments.
        arguments: of ``vllm.LLM``.
        memory: bytes of weights that are passed at a time.
        environment: more variables.

    Attributes:
        waits: whether there is no answer yet.
        silence: seconds between two signs of life, once it has started.
    """

    def __init__(
        self, program: Sequence[str], arguments: Mapping[str, Any], memory: int, environment: Mapping[str, str]
    ) -> None:
        process = Process(program, memory, environment)
        process.socket.settimeout(SILENCE_SECONDS)
        self._process, self._memory = process.popen, torch.frombuffer(process.memory, dtype=torch.uint8)
        self._connection = Connection(process.socket)
        self._last_line: deque[str] = deque(maxlen=1)
        self._log = threading.Thread(target=_copy, args=(self._process.stdout, self._last_line), daemon=True)
        self._log.start()
        self.close = weakref.finalize(self, process.end)
        self._tensors: list[tuple[str, str, list[int], int]] = []
        self._used = 0
        self._starts = self.waits = True
        self.silence = SILENCE_SECONDS
        self._heard = time.monotonic()
        self._send(dict(arguments))

    def ask(self, do: str, **arguments: Any) -> None:
        self._heard, self.waits = time.monotonic(), True
        self._send({"do": do, **arguments})

    def poll(self, seconds: float) -> tuple[Any] | None:
        """The answer, if it comes within some seconds.

        Raises:
            HpcRlhfError: the server failed, has ended, or shows no sign of life.
        """
        deadline = time.monotonic() + seconds
        while select.select([self._connection.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
            message = self._receive()
            if message is None:
                raise self._ended()
            if not isinstance(message, dict):
                self.close()
                raise self.failure(f"it sent something else than messages, and was killed{self._last_words}")
            self._heard = time.monotonic()
            if "error" in message:
                raise self._refused(message["error"])
            if "done" in message:
                self._starts = self.waits = False
                return (message["done"],)
        limit = START_SECONDS if self._starts else self.silence
        if time.monotonic() - self._heard > limit:
            self.close()
            raise self.failure(f"it showed no sign of life for {limit:.0f} s, and was killed{self._last_words}")
        return None

    def wait(self) -> Any:
        """The answer, however long it takes."""
        while (answer := self.poll(1.0)) is None:
            pass
        return answer[0]

    def pass_weight(self, name: str, tensor: Tensor) -> None:
        """Pass a weight, perhaps only at the next ``flush_weights``."""
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if self._used + flat.numel() > len(self._memory):
            self.flush_weights()
        self._memory[self._used : self._used + flat.numel()].copy_(flat)
        self._tensors.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._used))
        self._used += -(-flat.numel() // _ALIGNMENT) * _ALIGNMENT

    def flush_weights(self) -> None:
        if self._tensors:
            self.ask("load_weights", tensors=self._tensors, used=self._used)
            self.wait()
        self._tensors, self._used = [], 0

    def end_weights(self, version: str) -> None:
        """Ask for the use of the weights that were passed, under this name."""
        self.flush_weights()
        self.ask("end_weights", version=version)

    def failure(self, what: str, exit_code: int = RUN_FAILED) -> HpcRlhfError:
        begin = reasons.ENGINE_DID_NOT_START if self._starts else reasons.ENGINE_FAILED
        hint = "what vLLM wrote is in the log, or above; the engine in_process does without vLLM"
        return HpcRlhfError(begin + what, hint=hint, exit_code=exit_code)

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:  # what it said last may explain this
            self.wait()
            raise self._ended() from None

    def _receive(self) -> Any:
        try:
            return self._connection.receive()
        except OSError:
            return None
        except ValueError:
            return "no JSON"

    def _ended(self) -> HpcRlhfError:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.close()
            return self.failure(f"it broke off in the middle of a message, and was killed{self._last_words}")
        memory = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
        return self.failure(f"its process {keeper.ending(code)}{memory}{self._last_words}")

    @property
    def _last_words(self) -> str:
        self._log.join(_END_SECONDS)
        return f"; its last line: {self._last_line[0]}" if self._last_line else ""

    def _refused(self, error: str) -> HpcRlhfError:
        with suppress(subprocess.TimeoutExpired):  # its traceback is then in the log
            self._process.wait(_END_SECONDS)
        self.close()
        return self.failure(error, INPUT_WRONG if self._starts else RUN_FAILED)


def _copy(output: IO[bytes], last_line: deque[str]) -> None:
    """Copy a server's output to the log of this rank, and keep its last line."""
    with output:
        for line in output:
            os.write(2, line)
            if text := line.decode(errors="replace").strip():
                last_line.append(text[:200])
