"""A pool of processes answers, survives what its function does to it, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.train.rewards import workers
from hpc_rlhf.train.rewards.workers import Outcome, Pool
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled

MakePool = Callable[..., Pool]

# Items are Python expressions.
MODULE = """
import ctypes, os, signal, subprocess, sys, time

def make(missing=None):
    if missing:
        __import__(missing)
    return lambda item: eval(item, globals())

def starts_a_child(file):
    child = subprocess.Popen(["sleep", "60"])
    with open(file, "w") as pid:
        pid.write(str(child.pid))
    time.sleep(60)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePool]:
    (tmp_path / "judging.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pools = []

    def make(size: int = 1, timeout: float = 20, arguments: dict[str, str] | None = None, **options: Any) -> Pool:
        pools.append(Pool("judging:make", arguments or {}, size=size, timeout=timeout, **options))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def test_values_come_back_in_the_order_of_the_items(pool: MakePool) -> None:
    items = ["1 + 1", "len('" + "é" * 100_000 + "')", "'a\\nb' * 100000", "[None, float('inf')]", "os.getpid()"]
    answered = pool(size=2).map(items * 3)
    pids = {outcome.value for outcome in answered[4::5]}
    assert [outcome.value for outcome in answered[:4]] == [2, 100_000, "a\nb" * 100_000, [None, float("inf")]]
    assert [outcome.error for outcome in answered] == [None] * 15
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids


def test_what_fails_is_reported_and_the_next_item_works(pool: MakePool) -> None:
    items = {
        "1 / 0": "ZeroDivisionError: division by zero",
        "sys.exit(3)": "SystemExit: 3",
        "os._exit(3)": "its process ended with exit code 3",
        "ctypes.string_at(0)": "its process was killed by SIGSEGV",
        "object()": "TypeError: Object of type object is not JSON serializable",
        "'x' * 10**11": "MemoryError",
        "print('x' * 10**6, file=open(os.devnull, 'w')) or sys.stdin.read()": None,
    }
    answered = pool(memory=2**30).map([*items, "1 + 1"])
    assert [outcome.error for outcome in answered] == [*items.values(), None]
    assert answered[-1].value == 2


def test_what_hangs_is_killed_with_its_children_and_the_next_item_works(pool: MakePool, tmp_path: Path) -> None:
    one = pool(timeout=1)
    answered = one.map([f"starts_a_child('{tmp_path}/pid')", "9**9**9", "1"])
    assert answered == [Outcome(error="took longer than 1 s", too_long=True)] * 2 + [Outcome(1)]
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.05)
    return False


def test_a_stop_ends_the_wait_at_once(pool: MakePool) -> None:
    stops = iter([False, False, True])
    one = pool(should_stop=lambda: next(stops, True))
    with pytest.raises(WorkCancelled):
        one.map(["time.sleep(60)"] * 3)
    one.should_stop = bool
    assert one.map(["1"]) == [Outcome(1)]


def test_a_stop_while_a_worker_starts_spoils_no_later_call(pool: MakePool) -> None:
    one = pool(size=2, should_stop=lambda: True)
    for _ in range(5):
        with pytest.raises(WorkCancelled):
            one.map(["time.sleep(60)"] * 3)
    one.should_stop = bool
    assert one.map(["1", "2"]) == [Outcome(1), Outcome(2)]


def test_a_worker_that_cannot_start_says_why(pool: MakePool) -> None:
    why = "could not start: ModuleNotFoundError: No module named 'absent_package'"
    one = pool(arguments={"missing": "absent_package"})
    assert one.map(["1", "2"]) == [Outcome(error=why, unasked=True)] * 2
    assert one.start() == Outcome(error=why, unasked=True)


def test_a_worker_that_starts_too_slowly_says_so(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_SECONDS", 0.0)
    assert pool().start() == Outcome(error="could not start: took longer than 0 s", too_long=True, unasked=True)


def test_signals_for_the_rank_do_not_end_a_worker(pool: MakePool) -> None:
    ask = "[os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)] and 1"
    assert pool().map([ask]) == [Outcome(1)]


def test_workers_end_with_the_process_that_made_them(pool: MakePool, tmp_path: Path) -> None:
    program = (
        "from hpc_rlhf.train.rewards.workers import Pool\n"
        "one = Pool('judging:make', {}, size=1, timeout=60)\n"
        "print(one.map(['os.getpid()'])[0].value, flush=True)\n"
        "one.map(['9**9**9'])"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    assert is_gone(worker)
