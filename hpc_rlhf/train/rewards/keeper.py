"""A process that stays behind to end everything that its child starts, when the child or its own parent ends.

A process that leaves its session or its group still has it as its nearest living ancestor (``PR_SET_CHILD_SUBREAPER``),
so that it can be neither missed nor confused with another.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

# Ends a keeper; sent when the thread that started it ends.
END = signal.SIGHUP
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def continue_in_child(*files: int) -> None:
    """Return in a child of this process, which stays behind, and in the end exits or dies as the child does.

    Args:
        files: descriptors that only the child keeps, besides standard input and output.
    """
    prctl, wakes = ctypes.CDLL(None).prctl, {END, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, wakes)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    prctl(_PR_SET_PDEATHSIG, END)
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
