"""A run in a notebook: `open_run`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from hpc_rlhf import open_run
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.notebook import Run
from tests.observe.report_runs import add_line, evaluate, make_reported_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = make_reported_run(tmp_path / "run", monkeypatch, steps=5)
    row = {"total_steps": 5, "time": 1_700_000_000.25, "kind": "eval", "held_out_reward": float("nan")}
    add_line(made.stage("ppo").metrics, step=4, **row)
    evaluate(made, "Why?", {"sft": "Because."})
    report = json.loads(made.stage("eval").report.read_text())
    report["models"]["ppo"]["sources"] = {"sums": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    made.stage("eval").report.write_text(json.dumps(report))
    opened = open_run(made.path)
    assert isinstance(opened, Run)
    return opened


def test_metrics_are_those_of_the_file(run: Run) -> None:
    rows = [json.loads(line) for line in (run.path / "stages/ppo/metrics.jsonl").read_text().splitlines()]
    frame = run.metrics("ppo")
    assert list(frame.index) == [1, 2, 3, 4, 5]
    assert list(frame["reward"]) == [row["reward"] for row in rows[:5]]
    assert [time.timestamp() for time in frame["time"]] == [row["time"] for row in rows[:5]]
    assert "held_out_reward" not in frame
    held_out = run.metrics("ppo", held_out=True)
    assert list(held_out.index) == [4]
    assert held_out["time"].iloc[0] == pandas.Timestamp("2023-11-14 22:13:20.25", tz="UTC")
    assert math.isnan(held_out["held_out_reward"].iloc[0])
    assert run.metrics("reward", held_out=True).empty


def test_evaluation_has_every_number_with_its_interval(run: Run) -> None:
    rows = run.evaluation().fillna(-1).values.tolist()
    assert ["sft", "perplexity", 3.5, -1, -1] in rows
    assert ["ppo", "win_rate", 0.7, 0.6, 0.79] in rows
    assert ["ppo", "sums/accuracy", 0.5, 0.4, 0.6] in rows
    assert len(rows) == 4


def test_states_spec_and_models(run: Run) -> None:
    assert [run.states[stage] for stage in ("sft", "reward", "ppo")] == ["done"] * 3
    assert run.spec["stages"]["ppo"]["kl_coef"] > 0
    assert run.model() == run.path / "stages/ppo/model"
    assert run.model("sft") == run.path / "stages/sft/model"


def test_wrong_names_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(HpcRlhfError, match="has no stage 'ppi'; its stages are sft, reward, ppo"):
        run.metrics("ppi")
    with pytest.raises(HpcRlhfError, match="there is no model 'ppi'"):
        run.model("ppi")
    with pytest.raises(HpcRlhfError, match="has no dpo stage"):
        run.model("dpo")
    with pytest.raises(HpcRlhfError, match="does not exist"):
        open_run(tmp_path / "nowhere")


def test_only_data_frames_need_pandas(run: Run) -> None:
    code = """
import sys
sys.modules["pandas"] = None
from hpc_rlhf import open_run
from hpc_rlhf.errors import HpcRlhfError
run = open_run(sys.argv[1])
print(run.model())
try:
    run.metrics("ppo")
except HpcRlhfError as error:
    print(error)
print({"torch", "transformers", "numpy", "rich", "jinja2"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True)
    error = "pandas is not installed", "  hint: pip install pandas"
    assert done.stdout.splitlines() == [str(run.model()), *error, "set()"]
