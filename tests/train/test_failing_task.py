"""A failed rank on Slurm 26.05, whose srun then sends the others a preemption's signal, is recorded correctly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc_rlhf.run import failures
from hpc_rlhf.run.events import Requeued, Stopping
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.reasons import FAILED, KILLED, USER_ERROR
from hpc_rlhf.slurm.jobs import JobRecord
from tests.train.failing_task import run_as_srun
from tests.train.stages import log_tail, make_run, tiny_spec

pytestmark = pytest.mark.train


@pytest.mark.parametrize(
    ("fault", "reason", "message"),
    [
        ("exception", FAILED, "ValueError: the loss is not finite"),
        ("user error", USER_ERROR, "/scratch/a.jsonl: no such data file"),
        ("killed", KILLED, "task 1: Killed"),
        ("killed at the end", KILLED, "task 1: Killed"),
    ],
)
def test_a_failed_rank_is_neither_a_preemption_nor_requeued(
    tmp_path: Path, fault: str, reason: str, message: str
) -> None:
    run = make_run(tiny_spec(tmp_path / "run", 2, sft={"slurm": {"heal": {"enabled": False}}}))
    batch, commands = run_as_srun(run, fault, tmp_path / "tools")
    history = StageHistory.read(run, "sft")
    logs = SimpleNamespace(batch=batch, last_line=lambda rank: "")
    ended = failures.judge(history, JobRecord("9", "FAILED", "1:0"), logs, 2)
    assert (ended.reason, message in ended.message) == (reason, True), (ended, log_tail(run, "sft"))
    assert history.last(Requeued, Stopping) is None
    assert "requeue" not in commands
