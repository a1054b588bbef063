"""End to end without Slurm and with real training: run, interrupt, move, resume, chat."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.run.events import Interrupted, Resumed
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from tests.launch.fakes import wait_for

JOB = Path(__file__).parents[2] / "jobs/tiny.yaml"
SMALL = {
    "data.sources.0.demo": "900",
    "models.actor.from_scratch.hidden_size": "32",
    "models.actor.from_scratch.intermediate_size": "64",
    "models.actor.from_scratch.num_hidden_layers": "1",
    "stages.sft.max_steps": "40",
    "stages.reward.max_steps": "4",
    "stages.ppo.max_steps": "2",
}
# What the log of a stage's rank 0 says.
WORDS = {
    "sft": ("sft: loaded; starts", "sft: step 1/40, loss ", "sft: saved at step ", "sft: loaded; resumes from step "),
    "reward": ("loading data and models", "reward: step 4/4, loss ", "reward: finished, after "),
    "ppo": ("ppo: step 1/2, reward ", "ppo: step 2/2, reward "),
}


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hpc_rlhf.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps(run: RunDir, stage: str) -> list[int]:
    path = run.stage(stage).metrics
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    lines = map(json.loads, whole.splitlines())
    return [line["step"] for line in lines if line["kind"] == "train"]


@pytest.mark.train
def test_run_interrupt_move_resume_and_chat(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    words = ["run", str(JOB), "--set", f"run_dir={run.path}"]
    for field, value in SMALL.items():
        words += ["--set", f"{field}={value}"]

    process = start(words)
    wait_for(lambda: process.poll() is not None or len(steps(run, "sft")) >= 5, 180)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    saved = Ledger(run.ledger).last(Interrupted, "sft")
    assert saved is not None
    assert f"sft is saved at step {saved.step}" in err

    run = RunDir(Path(shutil.move(run.path, tmp_path / "moved")))
    process = start(["relocate", str(run.path)])
    process.communicate(timeout=60)
    process = start(["run", str(run.job_yaml)])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert not (tmp_path / "run").exists()
    resumed = Ledger(run.ledger).last(Resumed, "sft")
    assert resumed is not None
    assert resumed.step == saved.step >= 5
    assert steps(run, "sft") == list(range(1, 41))
    assert "held-out perplexity" in out
    assert "after PPO" in out
    logs = {stage: "".join(path.read_text() for path in run.stage(stage).logs.glob("*_0_log.*")) for stage in WORDS}
    for stage, words in WORDS.items():
        assert all(each in logs[stage] for each in words), logs[stage]
        assert not any(noise in logs[stage] for noise in ("submitit", "LOAD REPORT")), logs[stage]

    process = start(["chat", str(run.path), "--prompt", "What colour is snow?", "--max-tokens", "5"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.endswith("\n")
    assert out.count("\n") == 1
