"""What generates the responses of a stage."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, model_validator

from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.fields import FreeText, Model, PathText, Positive, Rate

# Arguments of vLLM that may not be passed through, and what to do instead.
_OWNED = {
    "data_parallel_size": "each group of rollout.tensor_parallel ranks has its own server",
    "disable_log_stats": "use VLLM_LOGGING_LEVEL",
    "distributed_executor_backend": "use rollout.tensor_parallel",
    "dtype": "use precision",
    "enable_lora": "adapters are merged into the weights",
    "enable_sleep_mode": "the engine stays awake",
    "generation_config": "sampling has fields of its own",
    "gpu_memory_utilization": "use rollout.gpu_memory",
    "load_format": "the weights are those in training",
    "logprobs_mode": "the correction needs those of the drawn tokens",
    "max_model_len": "use data.max_prompt_tokens and data.max_answer_tokens",
    "max_num_seqs": "use rollout.max_num_seqs",
    "model": "use models.actor",
    "pipeline_parallel_size": "use rollout.tensor_parallel",
    "quantization": "the weights are those in training",
    "seed": "use seed",
    "skip_tokenizer_init": "prompts and responses are tokens",
    "tensor_parallel_size": "use rollout.tensor_parallel",
    "tokenizer": "prompts and responses are tokens",
    "trust_remote_code": "models with code of their own are not supported",
    "worker_extension_cls": "weights come through it",
}


def _argument(name: str) -> str:
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError("give the name of an argument of vllm.LLM, such as enable_prefix_caching")
    if name in _OWNED:
        raise ValueError(f"hpc-rlhf owns vLLM's {name}: {_OWNED[name]}")
    return name


class SeparateSpec(Model):
    """GPUs on which vLLM runs and nothing trains: give one of the two fields."""

    gpus_per_node: Positive | None = None
    """How many of the slurm.gpus_per_node GPUs of each node; set slurm.ranks_per_node to the number of the others. On
    CPUs, the number of vLLM's processes on each node. It must be a multiple of tensor_parallel."""
    nodes: Positive | None = None
    """Nodes that run only vLLM, in addition to slurm.nodes, which train. Each has slurm.gpus_per_node GPUs; on CPUs,
    ranks_per_node processes of vLLM."""

    @model_validator(mode="after")
    def _check_one(self) -> SeparateSpec:
        if (self.gpus_per_node is None) == (self.nodes is None):
            raise ValueError("give gpus_per_node, or nodes")
        return self


class PlacementSpec(Model):
    """GPUs for vLLM alone."""

    separate: SeparateSpec = Field(description="Which GPUs.")


def _placement(value: object) -> object:
    if value == "colocated" or isinstance(value, PlacementSpec | dict):
        return value
    raise ValueError("give colocated, {separate: {gpus_per_node: N}} or {separate: {nodes: N}}")


class RolloutSpec(Model):
    """What generates the responses of a stage. [Rollouts](rollouts.md) says which to choose."""

    engine: Literal["in_process", "vllm"] = "in_process"
    """in_process: the training processes generate with the model they train, and a resumed run is the same, bit for
    bit. vllm: separate vLLM processes with their own Python generate; the other fields configure them. To learn from
    their responses, ppo and grpo need top_p: 1 and top_k: 0."""
    tensor_parallel: Positive = 1
    """GPUs, or processes on CPUs, that share the model in one of vLLM's servers."""
    placement: Annotated[Literal["colocated"] | PlacementSpec, BeforeValidator(_placement)] = "colocated"
    """Where the servers run. colocated: each group of tensor_parallel ranks has a server on its GPUs, so the ranks per
    node must be a multiple of tensor_parallel. {separate: …}: on GPUs of their own."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a GPU's memory that vLLM takes and keeps; by default 0.3, or 0.9 of GPUs of its own. On a CPU,
    VLLM_CPU_KVCACHE_SPACE sets the GiB of its cache."""
    max_num_seqs: Positive | None = None
    """Responses that vLLM generates at the same time, at most; by default, vLLM's own limit."""
    importance_cap: Rate = 2.0
    """vLLM and the model in training assign slightly different probabilities. Each token's loss is multiplied by their
    ratio, training over vLLM, capped at this value (truncated importance sampling)."""
    overlap: Annotated[int, Field(ge=0, le=1)] = 0
    """1: while the stage learns from a rollout, vLLM generates the next one, with the weights before that step
    (one-step-off). 0: each rollout is generated with the newest weights. For ppo and grpo."""
    python: PathText | None = None
    """vLLM's own Python, such as /opt/vllm/bin/python; by default .venv-vllm beside the virtual environment of
    hpc-rlhf, where `make install-vllm` puts it."""
    args: dict[Annotated[str, AfterValidator(_argument)], StrictBool | int | float | FreeText] = Field(
        default_factory=dict, description="More arguments of vllm.LLM. Those with a field of their own are rejected."
    )

    @model_validator(mode="after")
    def _check_engine(self) -> RolloutSpec:
        if self.overlap and self.engine != "vllm":
            raise ValueError("overlap: 1 needs engine: vllm, because processes that train cannot generate meanwhile")
        if self.placement != "colocated" and self.engine != "vllm":
            raise ValueError("separate needs engine: vllm, because in_process generates in the processes that train")
        return self

    @property
    def own_gpus(self) -> int:
        """GPUs on each node on which only vLLM runs."""
        return 0 if self.placement == "colocated" else self.placement.separate.gpus_per_node or 0

    @property
    def own_nodes(self) -> int:
        """Nodes on which only vLLM runs."""
        return 0 if self.placement == "colocated" else self.placement.separate.nodes or 0

    def servers(self, slurm: SlurmSpec) -> int:
        """Servers on each node that has any."""
        gpus = slurm.tasks_per_node
        if self.own_nodes:
            gpus = slurm.gpus_per_node or slurm.tasks_per_node
        return (self.own_gpus or gpus) // self.tensor_parallel

    @property
    def memory_share(self) -> float:
        """Share of a GPU's memory that vLLM takes."""
        return self.gpu_memory or (0.3 if self.placement == "colocated" else 0.9)


def interpreter(spec: RolloutSpec) -> str:
    """vLLM's own Python."""
    return spec.python or str(Path(sys.prefix).parent / ".venv-vllm" / "bin" / "python")
