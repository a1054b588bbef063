"""Where and how a stage runs: the Slurm settings of a spec."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from hpc_rlhf.slurm.durations import time_limit
from hpc_rlhf.spec.fields import (
    Command,
    FreeText,
    Gpu,
    Model,
    PathText,
    Positive,
    SbatchOption,
    SlurmMemory,
    SlurmTime,
    SlurmValue,
    Span,
)

# The settings that decide how many ranks a stage has.
SIZE = frozenset({"nodes", "gpus_per_node", "ranks_per_node"})


class ContainerSpec(Model):
    """A container that every rank runs in."""

    runtime: Literal["apptainer", "pyxis"] = Field(
        description="What starts the container: apptainer, or pyxis (srun --container-image)."
    )
    image: PathText = Field(
        description="The image: a .sif or .sqsh file, or a registry reference. Its python3 must have hpc-rlhf installed."
    )
    mounts: tuple[PathText, ...] = Field(
        default=(),
        description="Folders to mount, each `source` or `source:target`. The run directory is always mounted.",
    )


class HealSpec(Model):
    """How a chain mends itself. On Slurm a sentinel waits beside each stage: a small job that starts when it ends badly."""

    enabled: bool = Field(
        default=True,
        description="Whether a stage that ended badly is tried again without a person. Turn it off on a cluster where jobs may not be submitted from jobs, or where every queued job counts: then there are no sentinels, and a chain that broke waits for `hpc-rlhf heal`.",
    )
    partition: SlurmValue | None = Field(
        default=None,
        description="The sentinel's partition; the stage's when left out. Choose another where that one takes no jobs without GPUs, or gives whole nodes only.",
    )
    account: SlurmValue | None = Field(
        default=None,
        description="The account that pays for the sentinel's minute; the stage's when left out.",
    )
    qos: SlurmValue | None = Field(
        default=None,
        description="The sentinel's quality of service; the stage's when left out. One that starts small jobs soon mends soon.",
    )
    mem: SlurmMemory | None = Field(
        default=None,
        description="The sentinel's memory; the partition's default when left out. It needs about 200M.",
    )
    setup: tuple[Command, ...] | None = Field(
        default=None,
        description="Shell lines before `hpc-rlhf heal` in the sentinel; slurm.setup when left out. Give your own where those need a GPU or take long.",
    )
    extra: dict[SbatchOption, SlurmValue | StrictBool] = Field(
        default_factory=dict, description="Further sbatch options of the sentinel, as in slurm.extra."
    )
    backoff_seconds: Annotated[int, Field(ge=0, le=86400)] = Field(
        default=30,
        description="How long the first attempt after one without progress waits; each further one waits four times as long, an hour at most. More where what fails, such as a file system, takes long to come back.",
    )


class SlurmSpec(Model):
    """Where and how a stage's job runs. Under `hpc-rlhf run` only nodes and ranks per node count."""

    partition: SlurmValue | None = Field(
        default=None, description="Partition(s) to submit to; the cluster's default when left out."
    )
    account: SlurmValue | None = Field(default=None, description="Account to charge.")
    qos: SlurmValue | None = Field(default=None, description="Quality of service.")
    time: SlurmTime = Field(
        default="12:00:00",
        description="Time limit of one attempt, as Slurm writes it (minutes, H:MM:SS, D-HH:MM:SS). A stage that needs longer saves, requeues and goes on.",
    )
    nodes: Positive = Field(default=1, description="Nodes of the job.")
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = Field(
        default=1,
        description="GPUs asked for on each node; one rank runs on each. 0 asks for none: then set ranks_per_node.",
    )
    gpu: Gpu | None = Field(
        default=None,
        description="What the GPUs are, such as a100-80g, or the memory of one, such as 80G. Asks Slurm for nothing: give it so that `hpc-rlhf plan` tells whether each stage fits.",
    )
    ranks_per_node: Positive | None = Field(
        default=None, description="Ranks on each node; one per GPU when left out."
    )
    gres: SlurmValue | None = Field(
        default=None,
        description="Asked for in place of --gpus-per-node, such as gpu:a100:8; gpus_per_node still says how many ranks run on a node.",
    )
    cpus_per_gpu: Positive | None = Field(default=None, description="CPU cores for each rank.")
    mem: SlurmMemory | None = Field(
        default=None, description="Memory per node, such as 900G; 0 asks for all of it."
    )
    constraint: SlurmValue | None = Field(
        default=None, description="Node features wanted, such as a100&nvlink."
    )
    exclude: SlurmValue | None = Field(default=None, description="Nodes not to use.")
    nodelist: SlurmValue | None = Field(default=None, description="Nodes to use.")
    reservation: SlurmValue | None = Field(default=None, description="Reservation to run in.")
    exclusive: bool = Field(default=False, description="Share the nodes with no other job.")
    licenses: SlurmValue | None = Field(default=None, description="Licences wanted.")
    mail_type: SlurmValue | None = Field(
        default=None, description="When Slurm sends mail: END, FAIL, REQUEUE, …"
    )
    mail_user: SlurmValue | None = Field(default=None, description="Who gets the mail.")
    comment: FreeText | None = Field(default=None, description="A comment shown by squeue and sacct.")
    signal_seconds: Annotated[int, Field(ge=10, le=65535)] = Field(
        default=180,
        description="Seconds before the time limit at which the stage is told to save and requeue.",
    )
    max_requeues: Annotated[int, Field(ge=0)] = Field(
        default=100,
        description="How often a stage may be requeued before the chain stops and asks for a person.",
    )
    collective_timeout: Span = Field(
        default="2 h",
        description="How long a collective operation may take before the attempt fails: how long a rank waits for the slowest other one, for instance in a rollout or while storage is slow. It replaces torch's and DeepSpeed's 10 minutes. A rank that makes no progress at all is found sooner.",
    )
    setup: tuple[Command, ...] = Field(
        default=(),
        description="Shell lines run on the first node before the ranks start, such as `module load cuda` or `source venv/bin/activate`.",
    )
    launcher: Literal["srun", "torchrun", "deepspeed"] = Field(
        default="srun",
        description="What starts the ranks. srun is right for most: a Slurm task for each, and an end of the job that says which rank began it. torchrun or deepspeed start one task on each node, and that the node's ranks from the hostfile: choose one where a container should start once on a node and not once for each GPU, where Slurm would show each task its own GPU alone and NCCL could not copy between them, or where your site's own tools expect that launcher. The weights are the same.",
    )
    container: ContainerSpec | None = Field(default=None, description="A container that every rank runs in.")
    heal: HealSpec = Field(
        default_factory=HealSpec, description="How a stage that ended badly is tried again without a person."
    )
    extra: dict[SbatchOption, SlurmValue | StrictBool] = Field(
        default_factory=dict,
        description="Further sbatch options without their dashes, such as {switches: 1}; true for a bare flag. Options that have a field of their own are refused.",
    )

    @property
    def tasks_per_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.tasks_per_node

    @model_validator(mode="after")
    def _has_time_to_save(self) -> SlurmSpec:
        limit = time_limit(self.time)
        if limit is not None and limit <= self.signal_seconds:
            raise ValueError(
                f"time {self.time} is {limit} s, and signal_seconds would tell the stage to stop {self.signal_seconds} s before its end: at once"
            )
        return self

    @model_validator(mode="after")
    def _has_ranks(self) -> SlurmSpec:
        if self.tasks_per_node < 1:
            raise ValueError("gpus_per_node is 0, so ranks_per_node must say how many ranks run on a node")
        return self
