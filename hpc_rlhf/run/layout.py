"""The layout of a run directory: the only place that names a file of a run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError

# The name of a sweep's run, which is a folder; see spec/sweep.py.
_LABEL = re.compile(r"\w[\w.+=-]*", re.ASCII)


class Inside:
    """A file or folder of a layout, by its path from the layout's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, layout: StageDir | RunDir | SweepDir, kind: type) -> Path:
        return layout.path / self.name


@dataclass(frozen=True)
class StageDir:
    """The files of one stage of a run."""

    path: Path

    hostfile = Inside("hostfile")
    logs = Inside("logs")
    # A request to requeue the job, left by a stage that cannot reach Slurm from inside its container.
    requeue_request = Inside("requeue-request")
    metrics = Inside("metrics.jsonl")
    # The ids of the stage's run at the trackers, and how far each has been sent the metrics.
    trackers = Inside("trackers.json")
    tensorboard = Inside("tensorboard")
    samples = Inside("samples.jsonl")
    data = Inside("data")
    # Scores of rewards that may differ the next time, by step.
    rewards = Inside("rewards")
    # vLLM's responses, by step, and the model configuration it loads.
    rollouts = Inside("rollouts")
    engine = Inside("engine")
    checkpoints = Inside("checkpoints")
    # The stage's artifact; complete once its manifest verifies. The evaluation's is its report.
    model = Inside("model")
    # The model of another run while it is copied.
    reused_model = Inside("model.partial")
    # What clients of a job that serves the model must give.
    serve_token = Inside("serve.token")
    ema_model = Inside("model/ema")
    # The results of the evaluation, and the responses that it compared.
    report = Inside("model/report.json")
    answers = Inside("model/answers.jsonl")

    def policy(self, name: str) -> Path:
        """A chat model that the stage makes: its own, which has its name, or the moving average."""
        return self.model if name == self.path.name else self.ema_model

    def log(self, job_id: str, rank: int, stream: str) -> Path:
        """A rank's log, named as submitit names it; ``stream`` is out or err."""
        return self.logs / f"{job_id}_{rank}_log.{stream}"


@dataclass(frozen=True)
class RunDir:
    """A run directory on the shared file system."""

    path: Path

    # The spec as resolved at submission: defaults filled in, variables expanded.
    job_yaml = Inside("job.yaml")
    plan_json = Inside("plan.json")
    ledger = Inside("ledger.jsonl")
    report = Inside("report.html")
    submit_lock = Inside(".submit.lock")
    # Known to this run's ranks only; see run/secret.py.
    secret = Inside(".secret")
    scripts = Inside("scripts")
    # The votes on the served models; see run/feedback.py.
    feedback = Inside("feedback")

    def sbatch(self, stage: str) -> Path:
        return self.scripts / f"{stage}.sbatch"

    def sentinel(self, stage: str) -> Path:
        """The script of the job that repairs the chain when the stage fails."""
        return self.scripts / f"{stage}.sentinel.sbatch"

    def ds_config(self, stage: str, model: str = "") -> Path:
        """The DeepSpeed config of one of a stage's models, named as in ``StageSpec.strategies``."""
        return self.scripts / ".".join(filter(None, (stage, model, "ds_config.json")))

    def reward_file(self, digest: str, name: str) -> Path:
        """The run's copy of a Python file with a reward, by its content and name."""
        return self.scripts / "rewards" / digest / name

    def hostfile_template(self, stage: str) -> Path:
        return self.scripts / f"{stage}.hostfile.in"

    def stage(self, stage: str) -> StageDir:
        return StageDir(self.path / "stages" / stage)

    @property
    def stages(self) -> list[Path]:
        """The folders of the stages that have started, and links to those that another run trains."""
        folder = self.path / "stages"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def lender(self, stage: str) -> RunDir | None:
        """The run of the same sweep that also trains a stage for this one; None for a stage of its own."""
        path = self.stage(stage).path
        return RunDir(path.resolve().parent.parent) if path.is_symlink() else None

    @property
    def sweep(self) -> SweepDir:
        """The sweep that it belongs to, if there is one."""
        return SweepDir(self.path.parent)


@dataclass(frozen=True)
class SweepDir:
    """The folder that holds the folders of a sweep's runs."""

    path: Path

    # The names of its runs in order, and how many may run at the same time.
    json = Inside("sweep.json")
    # Of a search: its trials and their results, its spec, the script of the job that starts the next wave, its lock.
    trials = Inside("trials.jsonl")
    spec = Inside("search.yaml")
    sentinel = Inside("search.sentinel.sbatch")
    lock = Inside(".search.lock")

    def run(self, label: str) -> RunDir:
        return RunDir(self.path / label)

    def halving(self) -> tuple[str | None, list[str]]:
        """The metric by which trials of a search stop early, if they do, and the names of the trials.

        Raises:
            HpcRlhfError: as ``recorded`` does.
        """
        try:
            metric = json.loads(self.json.read_text(encoding="utf-8")).get("halving")
        except (OSError, ValueError, AttributeError):
            return None, []
        return metric if isinstance(metric, str) else None, self.recorded()[0]

    def recorded(self) -> tuple[list[str], int | None]:
        """The names of the runs and the limit that are recorded; no names in a folder that is not a sweep's.

        Raises:
            HpcRlhfError: a name does not stay in this folder.
        """
        try:
            facts = json.loads(self.json.read_text(encoding="utf-8"))
            names, limit = list(facts["runs"]), facts["limit"]
        except (OSError, ValueError, LookupError, TypeError):
            return [], None
        for name in names:
            if not (isinstance(name, str) and _LABEL.fullmatch(name)):
                what = f"{name!r} is not the name of a run of this sweep"
                raise HpcRlhfError(what, where=str(self.json), hint="submit the sweep again, which writes the file")
        return names, limit if isinstance(limit, int) and limit > 0 else None
