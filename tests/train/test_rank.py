"""A signal while a rank starts is neither lost nor fatal, and a rank's exit code is its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths


class ReportsSignal:
    """A stand-in for a stage: installs the stop flag, and prints what it received by then."""

    def __call__(self) -> int:
        from hpc_rlhf.train.runtime.stop_signals import StopFlag

        flag = StopFlag()
        flag.install()
        return flag.code


def test_a_signal_before_the_handlers_are_installed_is_delivered_then(tmp_path: Path) -> None:
    logs = tmp_path / "run/stages/sft/logs"
    logs.mkdir(parents=True)
    paths = JobPaths(logs, job_id="7", task_id=0)
    environment = {
        **os.environ, "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",  # noqa: E501
        "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    rank = subprocess.Popen(
        [sys.executable, "-u", "-m", "hpc_rlhf.rank", str(logs)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert rank.stdout is not None
    rank.stdout.readline()  # submitit's first line: it waits for the pickle now
    rank.send_signal(signal.SIGTERM)
    delayed = DelayedSubmission(ReportsSignal())
    delayed.set_timeout(10**7, 10**6)
    delayed.dump(tmp_path / "pickle")
    (tmp_path / "pickle").rename(paths.submitted_pickle)
    rank.communicate(timeout=60)
    assert rank.returncode == 0
    from submitit.core.utils import pickle_load

    assert pickle_load(paths.result_pickle) == ("success", 2)


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
