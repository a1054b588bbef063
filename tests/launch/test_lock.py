"""One launcher at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import lock

HOLD = "import sys,time,pathlib;from hpc_rlhf.launch.lock import hold\nwith hold(pathlib.Path(sys.argv[1]),'a test'): print('held',flush=True); time.sleep(60)"  # noqa: E501
RACE = """
import sys, time, pathlib
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.lock import hold
path = pathlib.Path(sys.argv[1])
while time.time() < float(sys.argv[2]): pass
try:
    with hold(path, "a race"):
        print("won", flush=True); time.sleep(1)
except HpcRlhfError:
    print("lost", flush=True)
"""


def write_owner(path: Path, **changes: object) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "born": lock._born(os.getpid()), "doing": "it"}
    path.write_text(json.dumps({**owner, **changes}))


def test_a_running_owner_keeps_the_lock_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(HpcRlhfError, match=f"a test.*process {owner.pid} on "), lock.hold(path, "me"):
            pass
        owner.kill()
        owner.wait()
    with lock.hold(path, "me"):  # killed without letting go: taken over
        assert json.loads(path.read_text())["doing"] == "me"
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_with_the_owners_id_does_not_hold_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    write_owner(path, born="1")
    with lock.hold(path, "me"):
        pass
    write_owner(path)
    with pytest.raises(HpcRlhfError), lock.hold(path, "me"):
        pass


def test_the_lock_of_another_machine_holds_while_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    write_owner(path, host="elsewhere")
    with pytest.raises(HpcRlhfError, match="on elsewhere"), lock.hold(path, "me"):
        pass
    long_ago = time.time() - lock.SILENCE - 60
    os.utime(path, (long_ago, long_ago))
    with lock.hold(path, "me"):
        pass


def test_a_corrupt_lock_file_expires(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("{")
    with pytest.raises(HpcRlhfError, match="another process"), lock.hold(path, "me"):
        pass
    os.utime(path, (1, 1))
    with lock.hold(path, "me"):
        pass


def test_one_of_several_processes_takes_over_a_stale_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    write_owner(path, born="1")
    go = time.time() + 1.5
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(path), str(go)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = sorted(racer.communicate()[0].strip() for racer in racers)
    assert said == ["lost", "lost", "lost", "won"]


def test_a_long_running_owner_keeps_its_lock_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other machines see only when the file was last touched."""
    path = tmp_path / ".lock"
    monkeypatch.setattr(lock, "_TOUCH_EVERY", 0.01)
    with lock.hold(path, "me"):
        os.utime(path, (1, 1))
        until = time.monotonic() + 10
        while path.stat().st_mtime == 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1
        write_owner(path, host="elsewhere")  # that took it over: theirs is not kept alive by us
        os.utime(path, (1, 1))
        time.sleep(0.1)
        assert path.stat().st_mtime == 1
