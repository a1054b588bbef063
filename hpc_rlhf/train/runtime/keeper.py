"""A process that stays behind to end everything that its child starts, when the child or its own parent ends.

A process that leaves its session or its group still has it as its nearest living ancestor (``PR_SET_CHILD_SUBREAPER``),
so that it can be neither missed nor confused with another.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

# Slurm sends these to every process of a job step. Only the rank reacts to them: it must start a keeper with them
# blocked, and the keeper ignores them.
RANK_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Ends a keeper; sent when the thread that started it ends.
_END = signal.SIGHUP
# For a keeper to end with all that its child started.
_END_SECONDS = 10.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def continue_in_child(*files: int) -> None:
    """Return in a child of this process, which stays behind, and in the end exits or dies as the child does. Both
    ignore ``RANK_SIGNALS``.

    Args:
        files: descriptors that only the child keeps, besides standard input and output.
    """
    for ignored in RANK_SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RANK_SIGNALS)
    prctl, wakes = ctypes.CDLL(None).prctl, {_END, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, wakes)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    prctl(_PR_SET_PDEATHSIG, _END)
    child = os.fork()
    if not child:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, wakes)
        return
    for number in (0, 1, *files):
        os.close(number)
    ended: dict[int, int] = {}
    while child not in ended and signal.sigwait(wakes) == signal.SIGCHLD:
        while (one := os.waitpid(-1, os.WNOHANG))[0]:
            ended.update([one])
            if child in ended:
                break
    ended.update(_end_children())
    code = os.waitstatus_to_exitcode(ended[child])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def end(keeper: subprocess.Popen[bytes]) -> None:
    """Kill a keeper's child and all that it started. The keeper must lead a session of its own."""
    keeper.send_signal(_END)
    try:
        keeper.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:  # such as a child that the kernel cannot end
        with suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()


def ending(code: int) -> str:
    """How a process with this return code ended."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_children() -> dict[int, int]:
    """Kill all children, and theirs, which become children as their parents end. Returns how each of them ended."""
    ended: dict[int, int] = {}
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        try:
            ended.update([os.waitpid(-1, 0)])
        except ChildProcessError:
            return ended
