"""Another release's Slurm is entered without a trace on this system, also when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import wait_until
from tests.cluster.cluster import CHECKOUT
from tests.cluster.processes import find

ROOT = Path("/var/cache/hpc-rlhf/trixie")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not ROOT.exists(), reason="scripts/newer-slurm.sh installed nothing"),
]
ENTER = [str(CHECKOUT / "scripts/newer-slurm.sh"), "trixie"]


def test_a_command_runs_with_another_slurm_and_this_python(tmp_path: Path) -> None:
    code = "import os, subprocess, sys, hpc_rlhf; print(os.getcwd(), subprocess.getoutput('slurmctld -V'))"
    done = subprocess.run([*ENTER, sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    folder, version = done.stdout.split(maxsplit=1)
    assert (folder, version.split(".")[0]) == (str(tmp_path), "slurm-wlm 24")
    assert subprocess.run([*ENTER, "sh", "-c", "exit 3"]).returncode == 3


def test_its_mounts_are_gone_with_it_also_when_killed() -> None:
    mark = f"NEWER_SLURM_TEST={os.getpid()}"
    command = [*ENTER, "sh", "-c", "sleep 100; exit 0"]
    killed = subprocess.Popen(command, env={**os.environ, "NEWER_SLURM_TEST": str(os.getpid())})
    wait_until(lambda: find(lambda each: mark in each.environ() and each.command() == "sleep 100"), 120, "it runs")
    assert str(ROOT) not in Path("/proc/mounts").read_text()
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    for process in find(lambda each: mark in each.environ()):
        process.kill()
    assert str(ROOT) not in Path("/proc/mounts").read_text()
