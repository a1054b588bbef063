"""The job spec as frozen models: every field, its type, its default and what it means."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # a third of pydantic's start-up time

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    model_validator,
)

from hpc_rlhf.spec.sbatch import refuse_owned, time_limit

STAGE_NAMES = ("sft", "reward", "ppo")

_NO_CONTROLS = r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*$"
_NAME = r"^[A-Za-z0-9._-]+$"
# What Slurm's own values are made of. Letters that a shell would act on are left out, except those that
# Slurm's node lists and constraints need; the scripts quote these.
_SLURM_VALUE = r"^[A-Za-z0-9_.][A-Za-z0-9_.,:/=+@%&|*()\[\]-]*$"
_SLURM_TIME = r"^([0-9]{1,9}(:[0-9]{2}){0,2}|[0-9]{1,6}-[0-9]{1,2}(:[0-9]{2}){0,2})$"
_SLURM_MEMORY = r"^[0-9]{1,12}[KMGT]?$"

# What each pattern asks for, for the messages.
PATTERN_WORDS = {
    _NO_CONTROLS: "must be one line without control characters",
    _NAME: "may hold only letters, digits and . _ -",
    _SLURM_VALUE: "may hold only letters, digits and _ . , : / = + @ % & | * ( ) [ ] -, and start with a letter, digit, _ or .",
    _SLURM_TIME: "must be a time limit as Slurm writes it: minutes, H:MM:SS or D-HH:MM:SS",
    _SLURM_MEMORY: "must be a size such as 900G",
}

# Text that ends up in a shell script or a `#SBATCH` line: no control characters anywhere.
FreeText = Annotated[str, StringConstraints(pattern=_NO_CONTROLS, max_length=4096)]
# An account or a time limit may be a number; YAML then reads it as one.
_NumberAsText = BeforeValidator(lambda raw: str(raw) if type(raw) is int else raw)
Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=128), _NumberAsText]
SlurmValue = Annotated[str, StringConstraints(pattern=_SLURM_VALUE, max_length=1024), _NumberAsText]
SlurmTime = Annotated[str, StringConstraints(pattern=_SLURM_TIME), _NumberAsText]
SlurmMemory = Annotated[str, StringConstraints(pattern=_SLURM_MEMORY), _NumberAsText]
SbatchOption = Annotated[str, AfterValidator(refuse_owned)]
PathText = Annotated[FreeText, StringConstraints(min_length=1, max_length=1024)]
Command = Annotated[FreeText, StringConstraints(min_length=1)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ContainerSpec(Model):
    """A container that every rank runs in."""

    runtime: Literal["apptainer", "pyxis"] = Field(
        description="What starts the container: apptainer, or pyxis (srun --container-image)."
    )
    image: PathText = Field(description="The image: a .sif or .sqsh file, or a registry reference.")
    mounts: tuple[PathText, ...] = Field(
        default=(),
        description="Folders to mount, each `source` or `source:target`. The run directory is always mounted.",
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
    setup: tuple[Command, ...] = Field(
        default=(),
        description="Shell lines run on the first node before the ranks start, such as `module load cuda` or `source venv/bin/activate`.",
    )
    container: ContainerSpec | None = Field(default=None, description="A container that every rank runs in.")
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


class SourceSpec(Model):
    """One source of training data."""

    path: PathText | None = Field(
        default=None,
        description="A hub data set id, or a local file or folder (json, jsonl, csv, parquet; .gz too).",
    )
    demo: Annotated[int, Field(ge=10, le=1_000_000)] | None = Field(
        default=None, description="Make this many short dialogues on the spot, in place of a path."
    )
    format: Literal["prompt-chosen-rejected", "hh", "messages", "instruction", "text"] | None = Field(
        default=None,
        description="What a row holds. prompt-chosen-rejected: columns prompt, chosen and (optional) rejected. hh: chosen and "
        "rejected are whole transcripts of Human/Assistant turns. messages: a list of {role, content}, or chosen and rejected "
        "lists. instruction: instruction, input, output. text: a column of plain text.",
    )
    weight: Rate = Field(
        default=1.0,
        description="Share of the rows used: 0.5 takes half of them, 2 takes each twice an epoch.",
    )
    split: FreeText = Field(default="train", description="Which split of a hub data set.")
    subset: FreeText | None = Field(default=None, description="Which configuration of a hub data set.")

    @model_validator(mode="after")
    def _one_origin(self) -> SourceSpec:
        if (self.path is None) == (self.demo is None):
            raise ValueError("give exactly one of path and demo")
        if self.path is not None and self.format is None:
            raise ValueError("a source with a path needs a format")
        return self


class SplitSpec(Model):
    """Relative shares of the prompts that each stage trains on; no prompt is in two stages."""

    sft: NonNegative = Field(default=2, description="Share of supervised fine-tuning.")
    reward: NonNegative = Field(default=4, description="Share of the reward model.")
    ppo: NonNegative = Field(default=4, description="Share of PPO.")


class DataSpec(Model):
    """The training data of all stages."""

    sources: Annotated[tuple[SourceSpec, ...], Field(min_length=1)] = Field(
        description="Sources, blended by weight."
    )
    split: SplitSpec = Field(default=SplitSpec(), description="How prompts are shared out among the stages.")
    held_out: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.05, description="Fraction of each stage's prompts kept for evaluation."
    )
    max_prompt_tokens: Positive = Field(
        default=256,
        description="Longest prompt; longer ones are left out of PPO and cut at the left elsewhere.",
    )
    max_answer_tokens: Positive = Field(
        default=256, description="Longest answer, given or generated; longer given ones are cut at the right."
    )


class FromScratch(Model):
    """A model made on the spot instead of a pretrained one."""

    from_scratch: dict[str, int | float | bool | str] = Field(
        description="The model's configuration: model_type (llama, opt, gpt2, qwen3, …) and that architecture's own fields. "
        "A BPE tokenizer of vocab_size is trained on the data."
    )

    @model_validator(mode="after")
    def _named(self) -> FromScratch:
        for key in ("model_type", "vocab_size"):
            if key not in self.from_scratch:
                raise ValueError(f"from_scratch needs {key}")
        if not isinstance(self.from_scratch["vocab_size"], int) or self.from_scratch["vocab_size"] < 270:
            raise ValueError(
                "vocab_size must be a whole number of at least 270: the 256 bytes and the special tokens"
            )
        return self


ModelRef = PathText | FromScratch


class ModelsSpec(Model):
    """The models that the stages start from."""

    actor: ModelRef = Field(
        description="Hub id or local folder of the language model to make a chat model of, or {from_scratch: …}."
    )
    reward: ModelRef | None = Field(
        default=None,
        description="The same for the reward model and the critic; the actor's when left out. It must share the actor's tokenizer.",
    )


class LoraSpec(Model):
    """Low-rank adaptation of the linear layers (arXiv 2106.09685). Merged into the weights on export."""

    rank: Positive = Field(description="Rank of the update.")
    alpha: Rate | None = Field(
        default=None, description="The update is scaled by alpha / rank; alpha is the rank when left out."
    )
    targets: tuple[Name, ...] | None = Field(
        default=None,
        description="Names of the linear modules to adapt, such as q_proj; all but the output head when left out.",
    )
    only: bool = Field(
        default=True,
        description="Train only the adapters. False also trains every weight that is not adapted.",
    )


class StageSpec(Model):
    """What all stages have in common."""

    epochs: Positive = Field(default=1, description="Passes over the stage's data.")
    max_steps: Positive | None = Field(
        default=None, description="Stop after this many steps even if epochs are left."
    )
    micro_batch: Positive = Field(
        default=4, description="Samples in one forward and backward pass on one GPU."
    )
    global_batch: Positive | None = Field(
        default=None,
        description="Samples in one optimizer step over all GPUs; micro_batch times ranks when left out. Accumulation follows from it.",
    )
    warmup: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Optimizer steps over which the learning rate rises from 0."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate goes on after the warm-up."
    )
    weight_decay: NonNegative = Field(default=0.0, description="AdamW's weight decay, on matrices only.")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="Adam's betas.")
    clip_grad: Rate = Field(default=1.0, description="Largest norm of the gradient.")
    zero: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="DeepSpeed's ZeRO stage: what is sharded over the ranks. 0 nothing, 1 optimizer, 2 and gradients, 3 and weights. Higher needs less memory and more traffic.",
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16", description="Precision of the forward and backward passes."
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Keep fewer activations and compute them again in the backward pass: less memory, about a third more time.",
    )
    dropout: Fraction = Field(default=0.0, description="Dropout while training.")
    lora: LoraSpec | None = Field(
        default=None,
        description="Train low-rank adapters in place of the whole model (in PPO: of the actor).",
    )
    checkpoint_every: Positive = Field(
        default=100,
        description="Steps between checkpoints. One is also written whenever the stage is told to stop.",
    )
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(default=2, description="Checkpoints kept.")
    slurm: SlurmSpec = Field(
        default=SlurmSpec(), description="Slurm settings of this stage, over those of the top-level slurm."
    )


class SftSpec(StageSpec):
    """Supervised fine-tuning on prompts and chosen answers."""

    lr: Rate = Field(default=9.65e-6, description="Peak learning rate.")
    answer_only: bool = Field(default=False, description="Learn the answers' tokens only, not the prompts'.")


class RewardSpec(StageSpec):
    """The reward model, trained on pairs of a chosen and a rejected answer. A sample is a pair."""

    lr: Rate = Field(default=5.0e-5, description="Peak learning rate.")


class PpoSpec(StageSpec):
    """Proximal policy optimisation (arXiv 1707.06347) of the actor against the reward model.

    One step is one rollout of global_batch x minibatches prompts and the optimizer steps on it.
    """

    warmup: Annotated[int, Field(ge=0)] = Field(
        default=100, description="Optimizer steps over which the learning rates rise from 0."
    )
    actor_lr: Rate = Field(default=9.65e-6, description="Peak learning rate of the actor.")
    critic_lr: Rate = Field(default=5.0e-6, description="Peak learning rate of the critic.")
    ppo_epochs: Positive = Field(default=1, description="Passes over each rollout's experience.")
    minibatches: Positive = Field(default=1, description="Optimizer steps in one pass over the experience.")
    temperature: Rate = Field(
        default=1.0, description="Sampling temperature; log-probabilities are taken at the same one."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Sample from the smallest set of tokens with this probability; 1 samples from all.",
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Sample from the k likeliest tokens; 0 samples from all."
    )
    kl_coef: NonNegative = Field(
        default=0.1, description="Weight of the KL penalty against the SFT model in the reward."
    )
    score_clip: Rate = Field(default=5.0, description="Reward scores are clipped to plus or minus this.")
    missing_eos_penalty: NonNegative = Field(
        default=0.0, description="Taken off the score of an answer that does not end."
    )
    cliprange: Rate = Field(default=0.2, description="Clip range of the actor's probability ratio.")
    cliprange_value: Rate = Field(default=0.2, description="Clip range of the critic's values.")
    gamma: Fraction = Field(default=1.0, description="Discount.")
    lam: Fraction = Field(
        default=0.95, description="Lambda of generalised advantage estimation (arXiv 1506.02438)."
    )
    whiten_advantages: bool = Field(
        default=True,
        description="Bring the advantages of a rollout to mean 0 and variance 1, over all ranks.",
    )
    ema: bool = Field(
        default=False,
        description="Keep an exponential moving average of the actor, and export it as a second model.",
    )
    ema_beta: Fraction = Field(
        default=0.992, description="Decay of the moving average at each optimizer step."
    )
    ptx: SourceSpec | None = Field(
        default=None,
        description="Pretraining text mixed into the actor's optimizer steps (InstructGPT's PPO-ptx), or null.",
    )
    ptx_coef: NonNegative = Field(default=27.8, description="Weight of the pretraining loss.")


class StagesSpec(Model):
    """The stages to run. PPO starts from the SFT model, if there is one, and needs a reward model."""

    sft: SftSpec | None = Field(default=None, description="Supervised fine-tuning.")
    reward: RewardSpec | None = Field(default=None, description="Reward model.")
    ppo: PpoSpec | None = Field(default=None, description="PPO.")

    @model_validator(mode="after")
    def _sound(self) -> StagesSpec:
        if self.sft is None and self.reward is None and self.ppo is None:
            raise ValueError("name at least one stage: sft, reward or ppo")
        if self.ppo is not None and self.reward is None:
            raise ValueError("ppo needs the reward stage")
        return self


class JobSpec(Model):
    """A whole run: data, models, stages and where they run."""

    name: Name = Field(description="Name of the run; Slurm jobs are called name.stage.")
    run_dir: PathText = Field(
        description="Folder of everything the run writes, on a file system that all nodes share. ${VAR} and ${VAR:-default} are filled in; a relative path starts where the command is run. The same holds for all paths of a spec."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=1234, description="Seed of everything random."
    )
    slurm: SlurmSpec = Field(default=SlurmSpec(), description="Slurm settings of all stages.")
    data: DataSpec = Field(description="Training data.")
    models: ModelsSpec = Field(description="Models to start from.")
    stages: StagesSpec = Field(description="Stages to run.")

    @model_validator(mode="before")
    @classmethod
    def _inherit_slurm(cls, raw: Any) -> Any:
        """Lay each stage's Slurm settings over the top-level ones."""
        if not isinstance(raw, dict) or not isinstance(raw.get("stages"), dict):
            return raw
        base = raw.get("slurm")
        if not isinstance(base, dict):
            return raw
        stages = {}
        for stage, fields in raw["stages"].items():
            own = fields.get("slurm", {}) if isinstance(fields, dict) else None
            stages[stage] = {**fields, "slurm": {**base, **own}} if isinstance(own, dict) else fields
        return {**raw, "stages": stages}

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages asked for, in an order in which every stage follows its needs."""
        return tuple(name for name in STAGE_NAMES if getattr(self.stages, name) is not None)

    def stage(self, name: str) -> StageSpec:
        spec = getattr(self.stages, name)
        assert isinstance(spec, StageSpec), name
        return spec

    def needs(self, name: str) -> tuple[str, ...]:
        """The stages whose artifacts a stage starts from."""
        return tuple(need for need in ("sft", "reward") if need in self.stage_names) if name == "ppo" else ()
