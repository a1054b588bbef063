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
from pathlib import Path

import pytest

from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.run.layout import RunDir
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


@pytest.mark.parametrize("ending", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_watch_redraws_on_resize_and_quits_on_a_key(run: RunDir, ending: bytes) -> None:
    mine, theirs = pty.openpty()
    resize(mine, 80)
    command = [sys.executable, "-m", "hpc_rlhf.cli", "watch", str(run.path)]
    environ = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    environ = {name: value for name, value in environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    before = termios.tcgetattr(theirs)
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ,
        process_group=None, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as watch:  # fmt: skip
        text = read_until(mine, "q to quit")
        assert "█" in text
        assert "tries" in text
        resize(mine, 140)
        assert "attempts" in read_until(mine, "attempts")
        os.write(mine, ending)
        assert "\x1b[?1049l" in read_until(mine, "\x1b[?1049l")  # the screen as it was
        assert watch.wait(30) == 0
    assert termios.tcgetattr(theirs)[3] == before[3]
    os.close(mine)
    os.close(theirs)


def test_watch_without_a_terminal_gives_a_hint(run: RunDir) -> None:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "watch", str(run.path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"hint: to print the status once: hpc-rlhf status {run.path}" in done.stderr
