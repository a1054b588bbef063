"""Sends a stage's metrics to Weights & Biases and MLflow, from a separate process.

A tracker loads slowly, starts threads and helpers, and may hang on the network. To keep that out of training,
rank 0 only starts this process, which follows metrics.jsonl until its standard input is closed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from hpc_rlhf import safe_path
from hpc_rlhf.run import manifest
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.masking import mask_all
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.notify import MlflowSpec, WandbSpec

_CLOSE_TIMEOUT, _HURRIED_CLOSE_TIMEOUT = 30.0, 3.0  # seconds that a stage waits at its end
_INTERVAL = 1.0
# Slurm sends these to every process of a step. The stage handles them; this process runs until the stage ends.
_IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Trackers:
    """The process that feeds a stage's trackers; none if the spec has no tracker."""

    def __init__(self, spec: JobSpec, run: RunDir, stage: str) -> None:
        """Start it. Lines of lost steps must have been removed from the stage's metrics before."""
        self._process: subprocess.Popen[bytes] | None = None
        if spec.trackers.wandb is None and spec.trackers.mlflow is None:
            return
        command = safe_path.module("hpc_rlhf.train.trackers", str(run.path), stage)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)  # a child inherits it
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        except OSError as error:
            _warn("trackers", error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self, quick: bool = False) -> None:
        """Let it send what is left, for at most 30 seconds, or 3 if quick."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_HURRIED_CLOSE_TIMEOUT if quick else _CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            print("hpc-rlhf: the trackers took too long and were stopped; metrics.jsonl is complete", file=sys.stderr)
        self._process = None


class Tracker(Protocol):
    """One tracker's run of one stage; continues the run of the stage's earlier attempts."""

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None: ...
    def finish(self, done: bool) -> None: ...


class Wandb:
    def __init__(self, settings: WandbSpec, spec: JobSpec, run: RunDir, stage: str, run_id: str) -> None:
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            dir=run.stage(stage).path,
            id=run_id,
            resume="allow" if settings.mode == "online" else None,
            name=f"{spec.name}.{stage}",
            group=spec.name,
            job_type=stage,
            config=_config(spec, stage),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, save_code=False),
        )
        # A step that is repeated after a stop is logged again, which wandb's own step counter would reject.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finish(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class Mlflow:
    def __init__(self, settings: MlflowSpec, spec: JobSpec, run: RunDir, stage: str, run_id: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they report every table that they create
        self._metric = Metric
        if settings.tracking_uri:
            self._client = MlflowClient(settings.tracking_uri)
            experiment = self._experiment(settings.experiment, None)
        else:
            with _own_store(run) as store:
                self._client = MlflowClient(store)
                experiment = self._experiment(settings.experiment, (run.path / "mlartifacts").as_uri())
        earlier = self._client.search_runs([experiment], f"tags.`hpc_rlhf.id` = '{run_id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"hpc_rlhf.id": run_id, "hpc_rlhf.run": spec.name, "hpc_rlhf.stage": stage}
            self._id = self._client.create_run(experiment, tags=tags, run_name=f"{spec.name}.{stage}").info.run_id
            params = [Param(key, value) for key, value in _flat(_config(spec, stage))]
            self._client.log_batch(self._id, params=params[:100])

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """The id of the experiment, which is created if there is none; another stage may create it at the same time."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):
            return self._client.create_experiment(name, artifacts)
        known = self._client.get_experiment_by_name(name)
        return known.experiment_id if known else self._client.create_experiment(name, artifacts)

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
        stamp = int(time * 1000)
        self._client.log_batch(self._id, [self._metric(key, value, stamp, step) for key, value in values.items()])

    def finish(self, done: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


@contextmanager
def _own_store(run: RunDir) -> Iterator[str]:
    """The address of a run's own store, locked, because stages that start together would create the same tables.

    It is a SQLite file. It is a folder of files if an earlier version of hpc-rlhf began the run, and on a file system
    without locks, such as Lustre mounted without flock, where SQLite does not work.
    """
    files = run.path / "mlruns"
    with (run.path / "mlflow.lock").open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX)
        except OSError:
            files.mkdir(exist_ok=True)
        if files.exists():
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        yield files.as_uri() if files.exists() else f"sqlite:///{run.path / 'mlflow.db'}"


def main() -> None:
    """Feed the trackers of the run and stage that the arguments name, until the input ends."""
    run, stage = RunDir(Path(sys.argv[1])), sys.argv[2]
    feed, ended = _Feed(read_spec(run.job_yaml), run, stage), False
    while feed.trackers and not ended:
        ended = bool(select.select([sys.stdin], [], [], _INTERVAL)[0])  # nothing is written to it
        feed.send_new()
    feed.finish()


class _Feed:
    """A stage's working trackers, and how many lines of its metrics each has received over all attempts.

    A stage that resumes from a checkpoint writes lost lines again, the same as before. So a line that was
    sent is not sent again, and one that a tracker was too slow for is sent later.
    """

    def __init__(self, spec: JobSpec, run: RunDir, stage: str) -> None:
        self._files = run.stage(stage)
        self._state: dict[str, Any] = {"id": uuid.uuid4().hex}
        with suppress(OSError, ValueError):
            self._state = json.loads(self._files.trackers.read_text())
        self._save()
        self.trackers: dict[str, Tracker] = {}
        settings, run_id = spec.trackers, self._state["id"]
        if settings.wandb is not None:
            with _guarded("wandb"):
                self.trackers["wandb"] = Wandb(settings.wandb, spec, run, stage, run_id)
        if settings.mlflow is not None:
            with _guarded("mlflow"):
                self.trackers["mlflow"] = Mlflow(settings.mlflow, spec, run, stage, run_id)

    def send_new(self) -> None:
        try:
            text = self._files.metrics.read_bytes()
        except FileNotFoundError:
            return
        lines = text[: text.rfind(b"\n") + 1].splitlines()
        for name, tracker in list(self.trackers.items()):
            new = lines[self._state.get(name, 0) :]
            if not new:
                continue
            sent = False
            with _guarded(name):
                _send(new, tracker)
                sent = True
            if sent:
                self._state[name] = len(lines)
                self._save()
            else:
                del self.trackers[name]

    def finish(self) -> None:
        done = manifest.is_done(self._files)
        for name, tracker in self.trackers.items():
            with _guarded(name):
                tracker.finish(done)

    def _save(self) -> None:
        write_atomically(self._files.trackers, json.dumps(self._state))


def _send(lines: Sequence[bytes], tracker: Tracker) -> None:
    for line in lines:
        row = json.loads(line)
        step, kind, time = row.pop("step"), row.pop("kind"), row.pop("time")
        del row["total_steps"]
        tracker.log(step, time, {f"{kind}/{key}": value for key, value in row.items() if value is not None})


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    """Turns an error of a tracker into a warning."""
    try:
        yield
    except ModuleNotFoundError as error:
        _warn(name, f"{error.name} is not installed where the ranks run: pip install 'hpc-rlhf[trackers]'")
    except Exception as error:
        _warn(name, error)


def _warn(name: str, why: object) -> None:
    text = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
    print(f"hpc-rlhf: nothing more is sent to {name}; the run continues: {text}", file=sys.stderr, flush=True)


def _config(spec: JobSpec, stage: str) -> dict[str, Any]:
    """The stage's settings, without those of Slurm, whose setup lines may contain anything."""
    settings = spec.stage(stage).model_dump(mode="json", exclude={"slurm"})
    run = spec.model_dump(mode="json", include={"name", "run_dir", "seed", "data", "models"})
    slurm = spec.stage(stage).slurm
    return mask_all({**run, "stage": stage, **settings, "nodes": slurm.nodes, "ranks": slurm.ranks})


def _flat(config: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in config.items():
        name = f"{path}{key}"
        pairs += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, str(value)[:500])]
    return pairs


if __name__ == "__main__":
    main()
