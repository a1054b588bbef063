"""A signal while a rank starts is neither lost nor fatal, and a rank's exit code is its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Starts a rank with a stage that waits, then handles signals and prints which it received by then.
RANK = """
import runpy, sys, types
import hpc_rlhf.train
from hpc_rlhf.train.runtime.stop_signals import StopFlag
def run_stage(run, stage):
    print(run, stage, flush=True)
    sys.stdin.readline()
    flag = StopFlag()
    flag.install()
    print(flag.code)
sys.modules["hpc_rlhf.train.entry"] = hpc_rlhf.train.entry = types.SimpleNamespace(run_stage=run_stage)
runpy.run_module("hpc_rlhf.rank", run_name="__main__", alter_sys=True)
"""


def test_a_signal_before_the_handlers_are_installed_is_delivered_then(tmp_path: Path) -> None:
    logs = tmp_path / "run/stages/sft/logs"
    logs.mkdir(parents=True)
    command = [sys.executable, "-u", "-c", RANK, str(logs)]
    rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == f"{tmp_path / 'run'} sft\n"
    rank.send_signal(signal.SIGTERM)
    assert rank.communicate("\n", timeout=60)[0] == "2\n"
    assert rank.returncode == 0


@pytest.mark.parametrize(
    ("work", "code"), [("print('done', end='')", 0), ("sys.exit(75)", 75), ("sys.exit('no')", 1), ("1 / 0", 1)]
)
def test_a_rank_exits_with_its_own_code_whatever_fails_while_python_shuts_down(work: str, code: int) -> None:
    program = f"import atexit, os, sys\natexit.register(os.abort)\ndef main(): {work}\n"
    end = "from hpc_rlhf.rank import exit_after\nexit_after(main)"
    done = subprocess.run([sys.executable, "-c", program + end], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == ("done" if code == 0 else "")
    assert ("ZeroDivisionError" in done.stderr) == ("/" in work)
