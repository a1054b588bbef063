"""The plan of a run: its jobs, what each needs, and how its batches are split over ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.masking import mask_all
from hpc_rlhf.spec.batch import Batch, derive_batch
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.rollout_checks import vllm_of
from hpc_rlhf.spec.training import StageSpec, TrainingSpec


@dataclass(frozen=True)
class PlannedJob:
    """One stage as one Slurm job; ``needs`` are the stages whose models it starts from."""

    stage: str
    job_name: str
    needs: tuple[str, ...]
    spec: StageSpec
    slurm: SlurmSpec
    batch: Batch

    @property
    def layout(self) -> dict[str, int]:
        """The ranks by dimension of parallelism, outermost first."""
        sizes = {"data": self.batch.ranks, "pipeline": self.spec.pipeline_stages, "sequence": 1, "tensor": 1}
        if isinstance(self.spec, TrainingSpec):
            sizes |= {"sequence": self.spec.sequence_parallel, "tensor": self.spec.tensor_parallel}
        return sizes

    @property
    def own_nodes(self) -> int:
        """Nodes, besides those of ``slurm``, on which only vLLM runs."""
        rollout = vllm_of(self.spec)
        return rollout.own_nodes if rollout else 0

    @property
    def servers(self) -> int:
        """Servers of vLLM on each of these nodes."""
        rollout = vllm_of(self.spec)
        return rollout.servers(self.slurm) if rollout else 0

    @property
    def nodes(self) -> int:
        """All nodes of the job."""
        return self.slurm.nodes + self.own_nodes


@dataclass(frozen=True)
class Plan:
    """All jobs of a run, each after the jobs it needs.

    Attributes:
        mail: the address for Slurm's mail when the run ends.
        umask: the octal umask of the run's processes.
    """

    name: str
    run: RunDir
    jobs: tuple[PlannedJob, ...]
    mail: str | None = None
    umask: str = "077"

    @property
    def needed(self) -> frozenset[str]:
        """Stages that other stages need."""
        return frozenset(need for job in self.jobs for need in job.needs)

    def as_dict(self) -> dict[str, object]:
        """The plan as JSON, with secrets in ``slurm.setup`` masked."""
        return {"name": self.name, "run_dir": str(self.run.path), "jobs": [_job_dict(job) for job in self.jobs]}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n"


def make_plan(spec: JobSpec) -> Plan:
    """The plan of a spec.

    Raises:
        HpcRlhfError: a stage's global batch is not a multiple of what its ranks take.
    """
    run = RunDir(Path(spec.run_dir))
    jobs = []
    for stage in spec.stage_names:
        settings = spec.stage(stage)
        try:
            batch = derive_batch(settings, stage)
        except ValueError as error:
            raise HpcRlhfError(str(error), where=f"stages.{stage}.global_batch") from error
        job_name = f"{spec.name}.{stage}"
        jobs.append(PlannedJob(stage, job_name, spec.needs(stage), settings, settings.slurm, batch))
    return Plan(spec.name, run, tuple(jobs), spec.notify.mail, "027" if spec.share == "group" else "077")


def _job_dict(job: PlannedJob) -> dict[str, object]:
    batch = asdict(job.batch)
    return {
        "stage": job.stage,
        "job_name": job.job_name,
        "needs": list(job.needs),
        "nodes": job.nodes,
        "ranks": job.slurm.ranks,
        "layout": job.layout,
        "batch": {"global" if key == "global_" else key: value for key, value in batch.items()},
        "slurm": mask_all(job.slurm.model_dump(mode="json", exclude_defaults=True)),
    }
