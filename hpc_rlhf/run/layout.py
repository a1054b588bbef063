"""The layout of a run directory: the only place that names a file of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageDir:
    """The files of one stage of a run."""

    path: Path

    @property
    def hostfile(self) -> Path:
        return self.path / "hostfile"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, job_id: str, rank: int, stream: str) -> Path:
        """A rank's log, named as submitit names it; ``stream`` is out or err."""
        return self.logs / f"{job_id}_{rank}_log.{stream}"

    @property
    def requeue_request(self) -> Path:
        """A request to requeue the job, left by a stage that cannot reach Slurm from inside its container."""
        return self.path / "requeue-request"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        """The ids of the stage's run at the trackers, and how far each has been sent the metrics."""
        return self.path / "trackers.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The stage's artifact; complete once its manifest verifies. The evaluation's is its report."""
        return self.path / "model"

    @property
    def ema_model(self) -> Path:
        return self.model / "ema"

    @property
    def report(self) -> Path:
        """The results of the evaluation."""
        return self.model / "report.json"

    @property
    def answers(self) -> Path:
        """The responses that the evaluation compared."""
        return self.model / "answers.jsonl"


@dataclass(frozen=True)
class RunDir:
    """A run directory on the shared file system."""

    path: Path

    @property
    def job_yaml(self) -> Path:
        """The spec as resolved at submission: defaults filled in, variables expanded."""
        return self.path / "job.yaml"

    @property
    def plan_json(self) -> Path:
        return self.path / "plan.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def submit_lock(self) -> Path:
        return self.path / ".submit.lock"

    @property
    def scripts(self) -> Path:
        return self.path / "scripts"

    def sbatch(self, stage: str) -> Path:
        return self.scripts / f"{stage}.sbatch"

    def sentinel(self, stage: str) -> Path:
        """The script of the job that repairs the chain when the stage fails."""
        return self.scripts / f"{stage}.sentinel.sbatch"

    def ds_config(self, stage: str, model: str = "") -> Path:
        """The DeepSpeed config of one of a stage's models, named as in ``StageSpec.strategies``."""
        return self.scripts / ".".join(filter(None, (stage, model, "ds_config.json")))

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

    @property
    def json(self) -> Path:
        """The names of its runs in order, and how many may run at the same time."""
        return self.path / "sweep.json"

    def run(self, label: str) -> RunDir:
        return RunDir(self.path / label)
