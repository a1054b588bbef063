"""Processes by identity: a pid and its start time, so that a reused pid is never mistaken for the old process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process; it may be gone by now."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this pid now; a zombie counts as gone."""
        fields = _stat(pid)
        return None if fields is None or fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    @property
    def parent(self) -> int:
        """The process id of its parent; 0 once it is gone."""
        return self._number(1)

    @property
    def session(self) -> int:
        """The process id of the leader of its session; 0 once it is gone."""
        return self._number(3)

    def _number(self, field: int) -> int:
        fields = _stat(self.pid)
        return int(fields[field]) if fields is not None and int(fields[19]) == self.started else 0

    def environ(self) -> set[str]:
        """The NAME=VALUE pairs it was started with; empty where they cannot be read."""
        return set(_read(self.pid, "environ").split("\0"))

    def command(self) -> str:
        return _read(self.pid, "cmdline").replace("\0", " ").strip()

    def kill(self) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def find(wanted: Callable[[Process], bool]) -> list[Process]:
    """Every process but this one for which ``wanted`` is true."""
    return [process for process in _all() if process.pid != os.getpid() and wanted(process)]


def kill_and_wait(processes: Iterable[Process], timeout: float = 10) -> list[Process]:
    """Kill processes; returns those that did not exit in time."""
    left = list(processes)
    for process in left:
        process.kill()
    deadline = time.monotonic() + timeout
    while (left := [process for process in left if process.alive]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _all() -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (process := Process.of(int(entry.name))) is not None:
            yield process


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name, which may itself contain spaces and parentheses."""
    return _read(pid, "stat").rpartition(")")[2].split() or None


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
