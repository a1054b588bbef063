"""hpc-rlhf eval as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.spec.sweep import load_any, specs_of
from tests.cli.test_startup import TRAINING, loaded_by
from tests.observe.test_evaluation import REPORT
from tests.spec.texts import JOBS
from tests.train.finished import as_if_trained
from tests.train.stages import make_run, tiny_spec


def cli(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hpc_rlhf.cli", *map(str, args)], capture_output=True, text=True)


def finish(run: RunDir, *stages: str) -> None:
    for stage in stages:
        folder = run.stage(stage).model
        folder.mkdir(parents=True)
        if stage == "eval":
            run.stage(stage).report.write_text(json.dumps(REPORT))
        manifest.write(folder, {"stage": stage, "step": 1, "seconds": 1.0, "metrics": {}})


def test_runs_that_cannot_be_evaluated_are_refused(tmp_path: Path) -> None:
    done = cli("eval", tmp_path / "nowhere")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"error: {tmp_path}/nowhere: does not exist")
    run = make_run(tiny_spec(tmp_path / "run", 1, sft={}, reward={}, ppo={}))
    finish(run, "sft")
    done = cli("eval", run.path)
    assert done.returncode == 2
    message = f"error: {run.path}: there is nothing to evaluate yet: reward and ppo are not finished"
    assert done.stderr.splitlines()[0] == message
    done = cli("eval", run.path, "--set", "stages.eval.prompt=3")
    assert (done.returncode, "did you mean prompts?" in done.stderr) == (2, True)
    assert not run.ds_config("eval").exists()


def test_sweep_with_one_existing_run_means_that_run(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    sweep = f"extends: {JOBS / 'tiny.yaml'}\nrun_dir: {tmp_path / 'runs'}\nsweep: {{seed: [1, 2]}}\n"
    file.write_text(sweep)
    (first, second) = specs_of(load_any(file))
    make_run(first)
    message = cli("eval", file).stderr
    assert "there is nothing to evaluate yet" in message
    assert first.run_dir in message
    make_run(second)
    assert second.run_dir in cli("eval", file).stderr  # one of them is to be named


def test_finished_evaluation_is_shown_without_training_code(tmp_path: Path) -> None:
    raw = tiny_spec(tmp_path / "run", 1, sft={}).model_dump(mode="json")
    raw["stages"]["eval"] = {}
    run = make_run(type(tiny_spec(tmp_path)).model_validate(raw))
    finish(run, "sft", "eval")
    done = cli("eval", run.path, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, REPORT)
    assert "wins against sft" in cli("eval", run.path).stdout
    assert not loaded_by("eval", str(run.path), cwd=tmp_path) & TRAINING
    assert not list(Ledger(run.ledger).events())


@pytest.mark.train
def test_run_without_the_stage_is_evaluated_with_defaults(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path / "run", 1, sft={}, reward={}, ppo={})
    run = make_run(spec)
    as_if_trained(run, spec)
    done = cli("eval", run.path, "--prompts", "5", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["prompts"], list(report["models"])) == (5, ["start", "sft", "ppo", "reference"])
    events = list(Ledger(run.ledger).events("eval"))
    assert [event.name for event in events if event.name in ("started", "finished")] == ["started", "finished"]
    job = tmp_path / "job.yaml"  # the user's own, without the stage
    job.write_text(dump_spec(spec))
    for arguments in ((run.path, "--prompts", "5"), (run.path,), (job,)):
        repeated = cli("eval", *arguments, "--json")
        assert json.loads(repeated.stdout) == report, repeated.stderr
    assert list(Ledger(run.ledger).events("eval")) == events  # not evaluated again
    status = json.loads(cli("status", run.path, "--json").stdout)["stages"][-1]
    shown = (status["stage"], status["state"], status["step"], status["metric"])
    assert shown == ("eval", "done", 4, "reward_accuracy")
