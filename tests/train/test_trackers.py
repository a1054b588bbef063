"""Trackers get every step once over all attempts, also offline, and their failures do not affect the run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec
from hpc_rlhf.spec.notify import TrackersSpec
from hpc_rlhf.train import trackers
from hpc_rlhf.train.trackers import Trackers
from tests.launch.specs import make_spec

SECRET = "very-secret-key-0123456789012345678901234567"


def prepared(path: Path, **asked: object) -> tuple[JobSpec, RunDir]:
    spec = make_spec(path, slurm={"setup": [f"export WANDB_API_KEY={SECRET}"]})
    spec = spec.model_copy(update={"trackers": TrackersSpec.model_validate(asked)})
    run = RunDir(path)
    run.stage("sft").path.mkdir(parents=True)
    run.job_yaml.write_text(dump_spec(spec))
    return spec, run


def log(run: RunDir, *steps: int) -> None:
    for step in steps:
        row = {"step": step, "total_steps": 9, "time": 1e9 + step, "kind": "train", "loss": 9.0 - step, "gone": None}
        with run.stage("sft").metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.mark.slow
def test_attempts_continue_the_same_tracker_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mlflow, *_ = (pytest.importorskip(name) for name in ("mlflow", "wandb", "sqlalchemy", "alembic"))
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT", 120.0)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    spec, run = prepared(tmp_path / "run", wandb={"project": "p"}, mlflow={"experiment": "e"})
    first = Trackers(spec, run, "sft")
    log(run, 1, 2)
    first.close()
    run.stage("sft").metrics.unlink()
    log(run, 1)  # the second step was lost, and is repeated
    second = Trackers(spec, run, "sft")
    log(run, 2, 3)
    run.stage("sft").model.mkdir()
    manifest.write(run.stage("sft").model, {"step": 3})
    second.close()
    assert capfd.readouterr().err == ""

    client = mlflow.MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("e")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 8.0), (2, 7.0), (3, 6.0)]
    assert (found.info.run_name, found.info.status) == ("demo.sft", "FINISHED")
    assert found.data.params["epochs"]

    name = json.loads(run.stage("sft").trackers.read_text())["id"]
    files = list((run.stage("sft").path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert len(files) == 2  # of one run: `wandb sync --append` joins them
    assert all(b"train/loss" in file.read_bytes() for file in files)
    for path in (path for path in run.path.rglob("*") if path.is_file() and path != run.job_yaml):
        assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_stages_that_start_together_share_one_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mlflow, *_ = (pytest.importorskip(name) for name in ("mlflow", "sqlalchemy", "alembic"))
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT", 120.0)
    spec, run = prepared(tmp_path / "a run", mlflow={"experiment": "e"})
    run.stage("reward").path.mkdir()
    both = [Trackers(spec, run, stage) for stage in ("sft", "reward")]
    log(run, 1)
    run.stage("reward").metrics.write_text(run.stage("sft").metrics.read_text())
    for each in both:
        each.close()
    assert capfd.readouterr().err == ""
    client = mlflow.MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert sorted(each.info.run_name for each in found) == ["demo.reward", "demo.sft"]
    assert [each.data.metrics for each in found] == [{"train/loss": 8.0}] * 2


WITHOUT_LOCKS = """
import errno, fcntl
def lockf(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.lockf = lockf
"""


def test_files_hold_the_metrics_where_sqlite_cannot_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT", 120.0)
    spec, run = prepared(tmp_path / "run", mlflow={"experiment": "e"})
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_LOCKS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    attempt = Trackers(spec, run, "sft")
    log(run, 1, 2)
    attempt.close()
    assert capfd.readouterr().err == ""
    assert not (run.path / "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient((run.path / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2]


def test_a_tracker_that_is_missing_or_hangs_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for package, text in (
        ("wandb", "raise ModuleNotFoundError(name='wandb')"),
        ("mlflow", "import time; time.sleep(600)"),
    ):
        (tmp_path / f"{package}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    spec, run = prepared(tmp_path / "run", wandb={"project": "p"})
    missing = Trackers(spec, run, "sft")
    log(run, 1, 2)
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT", 60.0)
    missing.close()
    (said,) = capfd.readouterr().err.splitlines()
    assert said == (
        "hpc-rlhf: nothing more is sent to wandb; the run continues: "
        "wandb is not installed where the ranks run: pip install 'hpc-rlhf[trackers]'"
    )
    spec, run = prepared(tmp_path / "other", mlflow={"experiment": "e"})
    hangs = Trackers(spec, run, "sft")
    process = hangs._process
    assert process is not None
    time.sleep(1)
    monkeypatch.setattr(trackers, "_HURRIED_CLOSE_TIMEOUT", 0.1)
    hangs.close(quick=True)
    assert process.poll() == -9
    assert "took too long" in capfd.readouterr().err


def test_a_spec_without_trackers_starts_nothing(tmp_path: Path) -> None:
    spec, run = prepared(tmp_path / "run")
    none = Trackers(spec, run, "sft")
    assert none._process is None
    none.close()
