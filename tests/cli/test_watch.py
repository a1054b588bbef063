"""hpc-rlhf watch on a terminal: drawing, resizing, quitting; and without a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.run.events import Submitted
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from tests.launch.specs import make_spec


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    spec = make_spec(tmp_path / "run")
    run = RunDir(Path(spec.run_dir))
    run.stage("sft").path.mkdir(parents=True)
    run.plan_json.write_text(make_plan(spec).to_json())
    run.job_yaml.write_text("")
    rows = [{"step": step, "total_steps": 9, "time": step, "kind": "train", "loss": 9 - step} for step in range(9)]
    run.stage("sft").metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def read_until(terminal: int, words: str) -> str:
    text = ""
    while words not in text:
        text += os.read(terminal, 1 << 16).decode("utf-8", "replace")  # EIO where it ended before
    return text


@contextmanager
def watching(run: RunDir, **variables: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The terminal's end of the user, and the process; checks that it leaves the terminal as it was."""
    mine, theirs = pty.openpty()
    resize(mine, 80)
    command = [sys.executable, "-m", "hpc_rlhf.cli", "watch", str(run.path)]
    environ = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", **variables}
    environ = {name: value for name, value in environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    before = termios.tcgetattr(theirs)
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ,
        process_group=None, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as watch:  # fmt: skip
        try:
            yield mine, watch
        finally:
            watch.kill()
    assert termios.tcgetattr(theirs)[3] == before[3]
    os.close(mine)
    os.close(theirs)


@pytest.mark.parametrize("ending", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_watch_redraws_on_resize_and_quits_on_a_key(run: RunDir, ending: bytes) -> None:
    with watching(run) as (mine, watch):
        text = read_until(mine, "q to quit")
        assert "█" in text
        assert "tries" in text
        resize(mine, 140)
        assert "attempts" in read_until(mine, "attempts")
        os.write(mine, ending)
        assert "\x1b[?1049l" in read_until(mine, "\x1b[?1049l")  # the screen as it was
        assert watch.wait(30) == 0


def test_a_key_pressed_while_slurm_is_slow_counts(run: RunDir, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    for name in ("squeue", "sacct"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {asked}\nsleep 2\n")
        (tmp_path / "bin" / name).chmod(0o755)
    Ledger(run.ledger).append(Submitted("sft", job_id="1"))
    with watching(run, PATH=f"{tmp_path}/bin:{os.environ['PATH']}") as (mine, watch):
        while not asked.exists():
            assert watch.poll() is None
            time.sleep(0.05)
        os.write(mine, b"q")
        assert watch.wait(30) == 0


def test_watch_without_a_terminal_gives_a_hint(run: RunDir) -> None:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "watch", str(run.path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"hint: to print the status once: hpc-rlhf status {run.path}" in done.stderr
