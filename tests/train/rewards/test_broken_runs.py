"""Users' functions that are broken, in stages that `hpc-rlhf run` starts with two ranks: what a user sees of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rlhf.cli import main
from hpc_rlhf.run.layout import RunDir
from tests.cluster.processes import find
from tests.train import ranks, stages
from tests.train.rewards import broken

pytestmark = pytest.mark.train

SKIPPED = ("too_few", "not_a_number", "exits", "leaves", "needs_package", "hangs")
UNHARMED = ("nothing", "prints", "forks")
# The second batch of rank 1 has a bad response, for which the function raises whenever it is asked about it.
RAISES = """
import os

batches, bad = 0, None

def raises(completion_ids, **columns):
    global batches, bad
    batches += 1
    if batches == 2 and os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
        bad = completion_ids[7]
    if bad in completion_ids:
        raise KeyError("no such answer")
    return [1.0 for _ in completion_ids]
"""
# Rank 1 hangs in the first attempt, and ends its process in the second.
ENDS = """
import os, pathlib, time

def ends(completions, **columns):
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
        if not pathlib.Path(__file__).with_name("tried").exists():
            pathlib.Path(__file__).with_name("tried").touch()
            time.sleep(1000)
        print("no key for the judge")
        os._exit(3)
    return [1.0 for _ in completions]
"""


def job(tmp_path: Path, *rewards: dict[str, Any]) -> str:
    """A spec of GRPO with some rewards."""
    spec = stages.tiny_spec(tmp_path / "run", grpo={"rewards": list(rewards), "eval_every": None, "global_batch": 32})
    fields = spec.model_dump(mode="json", exclude_defaults=True)
    fields["data"]["held_out"] = 0
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(fields))
    return str(file)


def trained(tmp_path: Path, *rewards: dict[str, Any]) -> tuple[RunDir, subprocess.CompletedProcess[str]]:
    """`hpc-rlhf run` with some rewards; no process of it is left."""
    words = ["run", job(tmp_path, *rewards), "--set", "slurm.heal={enabled: true, backoff_seconds: 0}"]
    mark = f"{tmp_path}/mark"
    done = subprocess.run(
        [sys.executable, "-m", "hpc_rlhf.cli", *words], env={**os.environ, "MARK": mark, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=ranks.MANY_DEADLINE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert not find(lambda process: f"MARK={mark}" in process.environ())
    assert "Traceback" not in done.stderr
    return RunDir(tmp_path / "run"), done


def test_a_wrong_signature_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = job(tmp_path, {"function": f"{broken.__file__}:wrong_signature"})
    assert main(["run", file]) == 2
    assert "stages.grpo.rewards.0: needs the column text, and no row has it" in capsys.readouterr().err
    assert not (tmp_path / "run/ledger.jsonl").exists()


def test_failures_are_skipped_until_one_that_stops_the_stage(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RAISES)
    kept = [{"function": f"{broken.__file__}:{name}", "name": name, "weight": 0.5} for name in UNHARMED]
    left_out = [
        {"function": f"{broken.__file__}:{name}", "name": name, "timeout": "2 s", "on_error": "skip"}
        for name in SKIPPED
    ]
    run, done = trained(tmp_path, *kept, *left_out, {"function": f"{tmp_path}/mine.py:raises", "name": "mine"})

    assert done.returncode == 2, done.stderr
    why = "raised KeyError: 'no such answer' (line 12 of mine.py), for response 7 of rank 1, "
    assert f"error: grpo: reward mine: {why}" in done.stderr
    assert "to continue without such responses, run again with on_error: skip;" in done.stderr
    (step,) = stages.metrics(run, "grpo")
    assert (step["rewards_failed"], step["reward"], step["reward/nothing"]) == (32, None, None)
    assert step["reward/prints"] == step["reward/forks"] == step["reward/mine"] == 1
    logs = [log.read_text() for log in run.stage("grpo").logs.glob("*_log.err")]
    assert len(logs) == 2
    assert all(log.count("what the reward prints from here on is left out") == 1 for log in logs)
    assert all(len(log) < 100_000 for log in logs)
    assert "warning: stage grpo: no reward applied to any response of the first step" in "".join(logs)


def test_a_function_that_hangs_or_ends_its_process_has_another_attempt(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ENDS)
    _, done = trained(tmp_path, {"function": f"{tmp_path}/mine.py:ends", "timeout": "2 s"})

    assert done.returncode == 1, done.stderr
    which = "for all 16 responses of rank 1; the first is "
    assert f"grpo: failed: reward function: took longer than 2 s (line 8 of mine.py), {which}" in done.stderr
    why = "its process ended with exit code 3 after printing 'no key for the judge', "
    assert f"error: grpo: reward function: {why}{which}" in done.stderr
