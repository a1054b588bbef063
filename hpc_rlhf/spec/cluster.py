"""The Slurm settings of a spec: where and how a stage runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from hpc_rlhf.slurm.jobs import time_limit
from hpc_rlhf.spec.fields import (
    Command,
    Duration,
    FreeText,
    Gpu,
    Model,
    PathText,
    Positive,
    SbatchOption,
    SentinelOption,
    SlurmMemory,
    SlurmTime,
    SlurmValue,
)

# The settings that determine the number of ranks.
SIZE = frozenset({"nodes", "gpus_per_node", "ranks_per_node"})


class ContainerSpec(Model):
    """A container that every rank runs in."""

    runtime: Literal["apptainer", "pyxis"]
    """The container runtime: apptainer, or pyxis (srun --container-image)."""
    image: PathText
    """The image: a .sif or .sqsh file, or a registry reference. Its python3 must have hpc-rlhf installed."""
    mounts: tuple[PathText, ...] = ()
    """Folders to mount, each `source` or `source:target`. The run directory is always mounted."""


class HealSpec(Model):
    """How a chain repairs itself. On Slurm each stage has a sentinel, a small job that starts if it fails."""

    enabled: bool = True
    """Retry failed stages automatically. Turn it off if your cluster does not allow jobs to submit jobs: there are no
    sentinels then, and a broken chain waits for `hpc-rlhf heal`."""
    partition: SlurmValue | None = None
    """The sentinel's partition; defaults to the stage's. Choose another one if the stage's allocates only whole
    nodes."""
    account: SlurmValue | None = None
    """The account charged for the sentinel, which runs for about a minute; defaults to the stage's."""
    qos: SlurmValue | None = None
    """The sentinel's quality of service; defaults to the stage's. The sooner it starts small jobs, the sooner the chain
    is repaired."""
    time: SlurmTime | None = None
    """The sentinel's time limit; defaults to slurm.time, or with a partition of its own to what that allows, and at
    most to 30 minutes. It usually needs a minute, and longer while storage or Slurm's controller is away."""
    gres: SlurmValue | None = None
    """Generic resources for the sentinel, such as gpu:1 where every job has to request a GPU. It uses none."""
    mem: SlurmMemory | None = None
    """The sentinel's memory; defaults to the partition's. It needs about 200M."""
    constraint: SlurmValue | None = Field(default=None, description="Node features that the sentinel requires.")
    exclude: SlurmValue | None = None
    """Nodes that the sentinel does not use; defaults to the stage's."""
    nodelist: SlurmValue | None = Field(default=None, description="Nodes for the sentinel.")
    reservation: SlurmValue | None = None
    """Reservation that the sentinel runs in; defaults to the stage's."""
    licenses: SlurmValue | None = Field(default=None, description="Licenses that the sentinel requests.")
    setup: tuple[Command, ...] | None = None
    """Shell commands that the sentinel runs before `hpc-rlhf heal`; defaults to slurm.setup. Set it if those commands
    need a GPU or take long."""
    extra: dict[SentinelOption, SlurmValue | StrictBool] = Field(default_factory=dict)
    """More sbatch options for the sentinel, as in slurm.extra, such as {exclusive: true}."""
    backoff_seconds: Annotated[int, Field(ge=0, le=86400)] = 30
    """Delay before the first retry after an attempt without progress. It is multiplied by four for every further one,
    up to an hour. Increase it if the cause, such as a file system, takes long to recover."""


class SlurmSpec(Model):
    """Where and how a stage's job runs. `hpc-rlhf run` uses only the numbers of nodes and ranks."""

    partition: SlurmValue | None = None
    """Partitions to submit to; defaults to the cluster's default partition."""
    account: SlurmValue | None = Field(default=None, description="Account to charge.")
    qos: SlurmValue | None = Field(default=None, description="Quality of service.")
    time: SlurmTime = "12:00:00"
    """Time limit of one attempt in Slurm's format (minutes, H:MM:SS, D-HH:MM:SS). A stage that needs longer saves,
    requeues itself and resumes."""
    nodes: Positive = Field(default=1, description="Nodes of the job.")
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs requested on each node, with one rank per GPU. With 0, set ranks_per_node."""
    gpu: Gpu | None = None
    """Type of the GPUs, such as a100-80g, or the memory of one, such as 80G. It requests nothing from Slurm: `hpc-rlhf
    plan` uses it to estimate whether each stage fits."""
    ranks_per_node: Positive | None = Field(default=None, description="Ranks on each node; defaults to one per GPU.")
    gres: SlurmValue | None = None
    """Requested instead of --gpus-per-node, such as gpu:a100:8. gpus_per_node still sets the number of ranks on a
    node."""
    cpus_per_gpu: Positive | None = Field(default=None, description="CPU cores for each rank.")
    mem: SlurmMemory | None = Field(default=None, description="Memory per node, such as 900G; 0 requests all of it.")
    constraint: SlurmValue | None = Field(default=None, description="Required node features, such as a100&nvlink.")
    exclude: SlurmValue | None = Field(default=None, description="Nodes not to use.")
    nodelist: SlurmValue | None = Field(default=None, description="Nodes to use.")
    reservation: SlurmValue | None = Field(default=None, description="Reservation to run in.")
    exclusive: bool = Field(default=False, description="Do not share the nodes with other jobs.")
    licenses: SlurmValue | None = Field(default=None, description="Licenses to request.")
    mail_type: SlurmValue | None = None
    """Events for which Slurm sends mail: END, FAIL, REQUEUE, …"""
    mail_user: SlurmValue | None = Field(default=None, description="Recipient of the mail.")
    comment: FreeText | None = Field(default=None, description="Comment shown by squeue and sacct.")
    signal_seconds: Annotated[int, Field(ge=10, le=65535)] = 180
    """Seconds before the time limit at which the stage saves and requeues itself."""
    max_requeues: Annotated[int, Field(ge=0)] = 100
    """How often a stage may be requeued before the chain stops and waits for the user."""
    expedite: bool = False
    """After a lost node, start the job again before all others, on the nodes that it still has. It needs Slurm 25.11 or
    newer with enable_expedited_requeue, of which `hpc-rlhf doctor` informs."""
    collective_timeout: Duration = "2 h"
    """How long a collective operation on tensors may take before the attempt fails: how long a rank waits for the
    slowest other one, for instance in a rollout or while storage is slow. It replaces torch's and DeepSpeed's 10
    minutes. A rank that makes no progress at all is found sooner. Control messages may wait 12 hours, because one rank
    may tokenize for that long."""
    setup: tuple[Command, ...] = ()
    """Shell commands that run on the first node, in the run directory, before the ranks start, such as `module load
    cuda` or `source /path/to/venv/bin/activate`."""
    launcher: Literal["srun", "torchrun", "deepspeed"] = "srun"
    """What starts the ranks. srun, the right choice for most clusters, starts one Slurm task per rank and records which
    rank failed first. torchrun and deepspeed start one task per node, which then starts the ranks of that node. Choose
    one of them if a container should start once per node rather than once per GPU, if Slurm restricts each task to its
    own GPU so that NCCL cannot copy between them, or if your site's tools expect that launcher. The resulting weights
    are the same."""
    container: ContainerSpec | None = Field(default=None, description="A container that every rank runs in.")
    heal: HealSpec = Field(default_factory=HealSpec, description="How failed stages are retried.")
    extra: dict[SbatchOption, SlurmValue | StrictBool] = Field(default_factory=dict)
    """More sbatch options without their dashes, such as {switches: 1}; true for a flag without a value. Options with
    their own field are rejected."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.tasks_per_node

    @model_validator(mode="after")
    def _check_time_to_save(self) -> SlurmSpec:
        limit = time_limit(self.time)
        if limit is not None and limit <= self.signal_seconds:
            raise ValueError(
                f"time {self.time} is {limit} s, but signal_seconds is {self.signal_seconds} s: the stage "
                "would have to stop at once"
            )
        return self

    @model_validator(mode="after")
    def _check_ranks(self) -> SlurmSpec:
        if self.tasks_per_node < 1:
            raise ValueError("gpus_per_node is 0, so ranks_per_node must set the number of ranks on a node")
        return self
