"""Runs in the sandbox of the code reward: a response's code with each of its tests, within limits.

It runs under the image's Python, without this package. It reads a task as JSON from standard input, and prints two
lines: what the sandbox leaves open, and how many tests passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
import types
from typing import Any

PASSED = b"passed"
POLL = 0.005
# Of the code: however many processes it starts, they do not keep the guard from running.
NICE = 10
PR_SET_DUMPABLE = 4
SCRATCH = ("/tmp", "/var/tmp", "/dev/shm")


def why_open(outside: dict[str, Any]) -> str | None:
    """What the sandbox leaves open; None if nothing. ``outside`` has the node's namespaces and folders."""
    for kind, link in outside["namespaces"].items():
        if os.readlink("/proc/self/ns/" + kind) == link:
            return f"it shares the {kind} namespace"
    for path, place in outside["folders"].items():
        try:
            status = os.stat(path)
        except OSError:
            continue
        if [status.st_dev, status.st_ino] == place:
            return "it shows " + path
    return None


def child(code: str, test: str, limits: dict[str, Any], pipe: int) -> None:
    """Pass the test, or end."""
    os.setsid()
    os.nice(NICE)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    seconds = int(limits["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (4 * limits["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = sys.modules["solution"] = types.ModuleType("solution")
    own = os.getpid()
    try:
        exec(compile(code, "solution.py", "exec"), module.__dict__)
        exec(compile(test, "test.py", "exec"), module.__dict__)
        if os.getpid() == own:
            os.write(pipe, PASSED)
    finally:
        os._exit(0)


def excess(limits: dict[str, Any], before: int) -> str | None:
    """Which limit the sandbox's processes exceed; None if none."""
    pids = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) not in (1, os.getpid())]
    if len(pids) > limits["processes"]:
        return f"started more than {limits['processes']} processes"
    size = written() - before
    if size > limits["disk"]:
        return f"wrote more than {limits['disk'] >> 20} MiB"
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as file:
                _, resident, shared, *_ = map(int, file.read().split())
                size += (resident - shared) * resource.getpagesize()
        except OSError:
            pass
    return f"used more than {limits['memory'] >> 20} MiB of memory" if size > limits["memory"] else None


def written() -> int:
    """Bytes in the folders for temporary files, which are in memory."""
    sizes = {}
    for folder in SCRATCH:
        try:
            system = os.statvfs(folder)
        except OSError:
            continue
        if not system.f_flag & os.ST_RDONLY:
            sizes[os.stat(folder).st_dev] = (system.f_blocks - system.f_bfree) * system.f_frsize
    return sum(sizes.values())


def judge(code: str, test: str, limits: dict[str, Any], deadline: float) -> tuple[bool, str | None]:
    """Whether a test passes, and which limit it exceeded."""
    reading, writing = os.pipe()
    before = written()
    pid = os.fork()
    if not pid:
        child(code, test, limits, writing)
    os.close(writing)
    output, ended = b"", False
    why: str | None = None
    while not (ended or why):
        if time.monotonic() > deadline:
            why = f"took longer than {limits['seconds']:g} s"
        ended = os.waitpid(pid, os.WNOHANG)[0] == pid
        why = why or excess(limits, before)  # also once it ended: its own children may have outgrown it
        if select.select([reading], [], [], 0 if ended else POLL)[0]:
            output += os.read(reading, len(PASSED))
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # all in this namespace but its first process and this one
    if not ended:
        os.waitpid(pid, 0)
    os.close(reading)
    return output == PASSED and not why, why


def main() -> None:
    task = json.load(sys.stdin)
    limits, why = task["limits"], why_open(task["outside"])
    print(json.dumps({"open": why}), flush=True)
    if why:
        return
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)  # the code cannot reach this process's memory and files
    deadline = time.monotonic() + limits["seconds"]
    results = [judge(task["code"], test, limits, deadline) for test in task["tests"]]
    whys = [why for _, why in results if why]
    print(json.dumps({"passed": sum(passed for passed, _ in results), "why": whys[0] if whys else None}))


if __name__ == "__main__":
    main()
