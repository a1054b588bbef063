"""hpc-rlhf list: which runs it finds, and the state of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.observe.listing import find_runs, list_runs
from hpc_rlhf.run import manifest, run_index
from hpc_rlhf.run.events import Failed, Ready, Started, Submitted
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import QueuedJob
from tests.launch.specs import make_spec


def make_run(path: Path) -> RunDir:
    run = RunDir(path)
    run.path.mkdir(parents=True)
    run.plan_json.write_text(make_plan(make_spec(path)).to_json())
    run.job_yaml.write_text("")
    return run


def finish(run: RunDir, stage: str) -> None:
    run.stage(stage).model.mkdir(parents=True)
    manifest.write(run.stage(stage).model, {"step": 9})


def test_state_is_that_of_the_most_important_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []

    def queue() -> dict[str, QueuedJob]:
        questions.append("squeue")
        return {
            "7": QueuedJob("7", "demo.reward", "RUNNING", "", ""),
            "8": QueuedJob("8", "demo.ppo", "PENDING", "Dependency", ""),
        }

    monkeypatch.setattr(commands, "queue", queue)
    monkeypatch.setattr(commands, "accounting", lambda job_ids: questions.append("sacct") or {})
    done, running, failed = (make_run(tmp_path / "all" / name) for name in ("done", "running", "failed"))
    for stage in ("sft", "reward", "ppo"):
        finish(done, stage)
    finish(running, "sft")
    for run in (running, failed):
        ledger = Ledger(run.ledger)
        ledger.append(Submitted("reward", token="t", job_id="7"))
        ledger.append(Submitted("ppo", token="u", job_id="8"))
        ledger.append(Started("reward", attempt="7-0", job_id="7"))
        ledger.append(Ready("reward", attempt="7-0"))
        rows = [{"step": step, "total_steps": 90, "time": 1e9 + step, "kind": "train", "loss": 1} for step in (1, 50)]
        run.stage("reward").path.mkdir(parents=True)
        run.stage("reward").metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Ledger(failed.ledger).append(Failed("sft", message="no such file\nmore"))
    lines = {line.name + Path(line.path).name: line for line in list_runs(find_runs([tmp_path]))}
    assert [(line.state, line.stage, line.done) for line in lines.values()] == [
        ("failed", "sft", 0), ("running", "reward", 1), ("done", None, 3),
    ]  # fmt: skip
    assert lines["demofailed"].why == "no such file"
    assert (lines["demorunning"].step, lines["demorunning"].total_steps, lines["demorunning"].left) == (50, 90, 40.0)
    assert questions == ["squeue", "sacct"]  # however many runs there are


def test_long_ledger_is_read_correctly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "queue", lambda: {"7": QueuedJob("7", "demo.sft", "RUNNING", "", "")})
    run = make_run(tmp_path / "run")
    Ledger(run.ledger).append(Submitted("sft", token="t", job_id="7"))
    Ledger(run.ledger).append(Started("sft", attempt="7-0", job_id="7"))
    saved = json.dumps({"time": 1, "event": "saved", "stage": "sft", "attempt": "7-0", "step": 1}) + "\n"
    with run.ledger.open("a") as file:
        file.write(saved * 2000)
    (line,) = list_runs(find_runs([tmp_path]))
    assert (line.state, line.stage) == ("running", "sft")


def test_prepared_runs_are_recorded_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert main(["list"]) == 0
    assert capsys.readouterr().err.startswith("no runs yet")
    for name in ("a", "b", "a"):
        spec = make_spec(tmp_path / name)
        with claim(spec, "test") as run:
            prepare(spec, run)
    assert run_index.known() == [tmp_path / "a", tmp_path / "b"]
    assert main(["list", "--json"]) == 0
    runs: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert {run["path"] for run in runs} == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert main(["list", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["run", "state", "stages", "step", "left", "last", "where"]
    assert len(table) == 3
    assert main(["list", str(tmp_path / "no")]) == 2
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/no")
    run_index.remember(tmp_path)  # a home that cannot be written costs nothing
    assert run_index.known() == []


def test_verbs_take_the_names_that_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    for folder, name in (("a", "one"), ("b", "a-long-name.kl_coef-0.02.seed-1"), ("c", "twice"), ("d", "twice")):
        spec = make_spec(tmp_path / "runs" / folder).model_copy(update={"name": name})
        with claim(spec, "test") as run:
            prepare(spec, run)
    for name, folder in (("one", "a"), ("a-long-name.kl_coef-0.02.seed-1", "b"), ("a-long-name.kl_coef-0.02.s…", "b")):
        assert main(["status", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["run_dir"] == str(tmp_path / "runs" / folder)
    (tmp_path / "one").mkdir()
    assert main(["cancel", "one"]) == 2  # not a run of that name elsewhere
    assert "one: is not a run directory" in capsys.readouterr().err
    assert main(["logs", "twice"]) == 2
    error = capsys.readouterr().err
    assert "twice: is the name of 2 runs" in error
    assert f"{tmp_path}/runs/c, {tmp_path}/runs/d" in error
    assert main(["status", "no-such-run"]) == 2
