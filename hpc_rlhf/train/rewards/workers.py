"""Spawned processes that judge responses, and are killed when one takes too long.

Some text makes a verifier hang, crash or fill its memory, and users' functions may do so on any text. A thread cannot
be stopped, and a forked process would share CUDA and the connections between ranks.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from hpc_rlhf import safe_path
from hpc_rlhf.train.rewards.output import Output
from hpc_rlhf.train.runtime import keeper
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled

# For a worker to start: its imports may come from a busy file system.
START_SECONDS = 300.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """The function's result for an item.

    Attributes:
        error: why there is no value; None if there is one.
        too_long: it exceeded the time limit.
        unasked: no process could start to compute it.
    """

    value: Any = None
    error: str | None = None
    too_long: bool = False
    unasked: bool = False


def usual_size() -> int:
    """How many processes verify a rank's responses while it waits for them."""
    return min(4, len(os.sched_getaffinity(0)))


class Pool:
    """Processes that apply a function to items, each to one at a time.

    They start at first use, and end with the pool or with this process, however it ends, and so does everything that
    they start.

    Args:
        make: ``module:name`` of what makes the function. Items and values cross as JSON.
        arguments: keyword arguments for it.
        size: processes, at most.
        timeout: seconds for an item.
        should_stop: polled while waiting.
        memory: bytes of address space that a process may use beyond those at its start; None sets no limit.
        output: what passes on what its one process prints; by default, that goes to this process's standard error.
    """

    def __init__(
        self, make: str, arguments: Mapping[str, Any], *, size: int, timeout: float,
        should_stop: Callable[[], bool] = bool, memory: int | None = None, output: Output | None = None,
    ) -> None:  # fmt: skip
        self.timeout, self.should_stop, self._output = timeout, should_stop, output
        worker = "hpc_rlhf.train.rewards.worker"
        self._command = safe_path.module(worker, make, json.dumps(dict(arguments)), json.dumps(memory))
        # Each thread has a process, which must not receive signals before it can ignore them.
        block = (signal.SIG_BLOCK, keeper.RANK_SIGNALS)
        self._threads = ThreadPoolExecutor(size, "rewards", signal.pthread_sigmask, block)
        self._own = threading.local()
        self._workers: set[_Worker] = set()

    def start(self) -> Outcome:
        """Start a process, which has an error if it cannot.

        Raises:
            WorkCancelled: ``should_stop`` returned True.
        """
        (outcome,) = self.map([None])
        return outcome

    def map(self, items: Sequence[Any]) -> list[Outcome]:
        """The outcome of each item. For None, the function is not called.

        Raises:
            WorkCancelled: ``should_stop`` returned True.
        """
        self._broken: Outcome | None = None
        futures = [self._threads.submit(self._apply, item) for item in items]
        try:
            while wait(futures, _POLL_SECONDS).not_done:
                if self.should_stop():
                    raise WorkCancelled
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            self._kill()
            while wait(futures, _POLL_SECONDS).not_done:
                self._kill()  # a process that has started since
            raise

    def close(self) -> None:
        """End all processes."""
        self._kill()
        self._threads.shutdown()
        for worker in self._workers:
            worker.close()

    def _kill(self) -> None:
        for worker in list(self._workers):
            worker.kill()

    def _apply(self, item: Any) -> Outcome:
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None or worker.ended:
            if self._broken is None:
                worker = self._own.worker = self._start(worker)
            if self._broken is not None:  # the other items need not try
                return replace(self._broken, error=f"could not start: {self._broken.error}", unasked=True)
        assert worker is not None
        return worker.receive(self.timeout, json.dumps(item).encode() + b"\n")

    def _start(self, last: _Worker | None) -> _Worker:
        if last is not None:
            self._workers.remove(last)
            last.close()
        worker = _Worker(self._command, self._output)
        self._workers.add(worker)
        if (outcome := worker.receive(START_SECONDS)).error is not None:
            worker.kill()
            self._broken = outcome
        return worker


class _Worker:
    """A process that answers each line with a line."""

    def __init__(self, command: Sequence[str], output: Output | None) -> None:
        self._answers, theirs = os.pipe()
        self._output = output
        printed = 2 if output is None else output.writer
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs)], stdin=subprocess.PIPE, stdout=printed, stderr=printed, pass_fds=[theirs],
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(theirs)
        assert self._process.stdin is not None
        self._questions = self._process.stdin.fileno()
        os.set_blocking(self._questions, False)
        self._lock, self.ended = threading.Lock(), False

    def receive(self, timeout: float, question: bytes = b"") -> Outcome:
        """The next answer, after a question. A process that does not answer in time is killed."""
        try:
            return self._receive(timeout, question)
        finally:
            if self._output is not None:
                self._output.pass_on()

    def _receive(self, timeout: float, question: bytes) -> Outcome:
        deadline, answer = time.monotonic() + timeout, b""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if question:
            poll.register(self._questions, select.POLLOUT)
        if self._output is not None:
            poll.register(self._output.reader, select.POLLIN)
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill()
                return Outcome(error=f"took longer than {timeout:g} s", too_long=True)
            ready = dict(poll.poll(left * 1000))
            if self._output is not None and self._output.reader in ready:
                self._output.pass_on()
            if self._answers in ready:
                part = os.read(self._answers, 1 << 20)
                if not part:
                    self.kill()
                    return Outcome(error=f"its process {keeper.ending(self._process.returncode)}")
                answer += part
            elif self._questions in ready:
                try:
                    question = question[os.write(self._questions, question) :]
                except BrokenPipeError:
                    question = b""
                if not question:
                    poll.unregister(self._questions)
        return Outcome(**json.loads(answer))

    def kill(self) -> None:
        """Kill the process and all that it started."""
        with self._lock:
            if not self.ended:
                keeper.end(self._process)
                self.ended = True

    def close(self) -> None:
        self.kill()
        os.close(self._answers)
        assert self._process.stdin is not None
        self._process.stdin.close()
