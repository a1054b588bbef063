"""Proven settings: DeepSpeed-Chat's published numbers, by actor size and machine, and starter specs made of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hpc_rlhf.spec.stages import STAGE_KINDS, StageKind
from hpc_rlhf.spec.yaml_source import Mark, parse_yaml

DEPLOYMENTS = ("single_gpu", "single_node", "multi_node")


@dataclass(frozen=True)
class Recipe:
    """Proven settings for one actor size on one kind of machine."""

    billions: float  # parameters of the actor
    deployment: str
    nodes: int
    gpus_per_node: int
    stages: dict[str, dict[str, object]]

    @property
    def machine(self) -> str:
        if self.deployment == "single_gpu":
            return "one GPU"
        nodes = "one node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{nodes} of {self.gpus_per_node} GPUs"


_LORA = {"lora": {"rank": 128}}
_REWARD = {"epochs": 1, "lr": 5e-5, "weight_decay": 0.1, "zero": 0}
_PPO_FULL = {"epochs": 1, "actor_lr": 9.65e-6, "critic_lr": 5e-6}
_PPO_LORA = {"epochs": 1, "actor_lr": 5e-4, "critic_lr": 5e-6}

# fmt: off
RECIPES = (
    Recipe(
        1.3, "single_gpu", nodes=1, gpus_per_node=1,
        stages={
            "sft": {"epochs": 1, "lr": 1e-3, "micro_batch": 16, "global_batch": 128, "zero": 0, **_LORA},
            "reward": {**_REWARD, "micro_batch": 16, "global_batch": 64},
            "ppo": {**_PPO_FULL, "micro_batch": 16, "global_batch": 32, "zero": 0, **_LORA},
        },
    ),
    Recipe(
        1.3, "single_node", nodes=1, gpus_per_node=8,
        stages={
            "sft": {"epochs": 16, "lr": 9.65e-6, "micro_batch": 8, "zero": 2},
            "reward": {**_REWARD, "micro_batch": 4},
            "ppo": {**_PPO_FULL, "micro_batch": 4, "zero": 2, "ema": True},
        },
    ),
    Recipe(
        6.7, "single_node", nodes=1, gpus_per_node=8,
        stages={
            "sft": {
                "epochs": 16, "lr": 9.65e-6, "micro_batch": 6, "zero": 3, "activation_checkpointing": True,
            },
            "reward": {**_REWARD, "micro_batch": 4},
            "ppo": {**_PPO_FULL, "micro_batch": 4, "weight_decay": 0.1, "zero": 3},
        },
    ),
    Recipe(
        13.0, "single_node", nodes=1, gpus_per_node=8,
        stages={
            "sft": {"epochs": 16, "lr": 1e-4, "micro_batch": 4, "zero": 3, **_LORA},
            "reward": {**_REWARD, "micro_batch": 4},
            "ppo": {**_PPO_LORA, "micro_batch": 16, "zero": 3, **_LORA},
        },
    ),
    Recipe(
        66.0, "multi_node", nodes=8, gpus_per_node=8,
        stages={
            "sft": {"epochs": 2, "lr": 1e-4, "micro_batch": 4, "weight_decay": 0.1, "zero": 3, **_LORA},
            "reward": {**_REWARD, "micro_batch": 2},
            "ppo": {**_PPO_LORA, "micro_batch": 4, "zero": 3, **_LORA},
        },
    ),
)
# fmt: on


_HEAD = """\
# {model} as a chat model, on {machine}.
# {origin}
#
#   hpc-rlhf check {file}     lists every error in it
#   hpc-rlhf plan {file}      shows the jobs
#   hpc-rlhf submit {file}    submits them to Slurm
name: {name}
# On a file system that all nodes share. A relative path starts at the working directory.
run_dir: ${{SCRATCH:-.}}/runs/{folder}
seed: 1234

slurm:
  # As your site requires; without them, the cluster's defaults apply.
  # partition: gpu
  # account: my-project
  # qos: normal
  nodes: {nodes}
  gpus_per_node: {gpus}
  cpus_per_gpu: 8
  # Of one attempt: a stage that needs longer saves, requeues itself and resumes.
  time: "12:00:00"
  # Run on the first node before the ranks start.
  # setup: [module load cuda, source /path/to/venv/bin/activate]
  # container: {{runtime: apptainer, image: /path/to/image.sif}}

data:
  sources:
    - {{path: Dahoas/rm-static, format: prompt-chosen-rejected}}
  # Shares of the prompts; no prompt is used by two stages.
  split: {split}
  max_prompt_tokens: 256
  max_answer_tokens: 256

models:
  actor: {actor}
  # Also the initial critic. It must have the actor's tokenizer.
  reward: {reward}

stages:
"""

_FIELD_COMMENTS = {
    "global_batch": "samples per step; the gradients of several passes are accumulated",
    "zero": "what is sharded over the GPUs: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights",
    "lora": "train low-rank adapters instead of all weights",
    "ema": "also export a moving average of the actor",
    "activation_checkpointing": "less memory, about a third more time",
}


def billions_in(name: str) -> float | None:
    """The billions of parameters according to a model's name, such as 1.3 for `facebook/opt-1.3b`."""
    sizes = re.findall(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    if not sizes:
        return None
    experts, number, unit = sizes[-1]
    return int(experts or 1) * float(number) / (1 if unit == "b" else 1000) or None


def nearest(deployment: str, billions: float) -> Recipe:
    """The recipe for this kind of machine with the closest actor size."""
    fitting = [recipe for recipe in RECIPES if recipe.deployment == deployment]
    return min(fitting, key=lambda recipe: abs(math.log(recipe.billions / billions)))


def write_starter(recipe: Recipe, *, actor: str, reward: str, name: str, file: str) -> str:
    """The text of a commented job spec to start from.

    Args:
        recipe: the numbers.
        actor: hub id or folder of the model to turn into a chat model.
        reward: the same for the reward model and the critic.
        name: name of the run.
        file: name of the spec's file, for its header.
    """
    kinds = [kind for kind in STAGE_KINDS if kind.name in recipe.stages]
    text = _HEAD.format(
        model=actor,
        machine=recipe.machine,
        origin=_origin(recipe, billions_in(actor)),
        file=file,
        name=_scalar(name),
        folder=name,
        nodes=recipe.nodes,
        gpus=recipe.gpus_per_node,
        actor=_scalar(actor),
        reward=_scalar(reward),
        split=_scalar({kind.name: kind.share for kind in kinds}),
    )
    explained: set[str] = set()
    blocks = [_stage(number, kind, recipe.stages[kind.name], explained) for number, kind in enumerate(kinds, 1)]
    return text + "\n".join(blocks)


def _origin(recipe: Recipe, billions: float | None) -> str:
    """Where the numbers come from, and whether they suit a model of this size."""
    origin = f"Hyperparameters from DeepSpeed-Chat, {recipe.billions:g} billion parameters on {recipe.machine}."
    if billions is None:
        return f"{origin} The model's name does not give its size: check that they suit it."
    if not 1 / 1.6 <= billions / recipe.billions <= 1.6:
        return f"{origin}\n# Untested at {billions:g} billion: check that memory and learning rates suit it."
    return origin


def _stage(number: int, kind: StageKind, fields: dict[str, object], explained: set[str]) -> str:
    lines = [f"  # {number}. {kind.summary}", f"  {kind.name}:"]
    for key, value in fields.items():
        comment = _FIELD_COMMENTS.get(key) if key not in explained else None
        explained.add(key)
        line = f"    {key}: {_scalar(value)}"
        lines.append(f"{line:<36}# {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """A value in readable YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value < 0.01:
        digits, _, power = f"{value:.6e}".partition("e")
        # With a dot, because other YAML readers take 5e-5 for text.
        return f"{float(digits)}e{int(power)}"
    if isinstance(value, str) and parse_yaml(value, Mark("")).value != value:
        return f'"{value}"'  # such as `no`, which YAML reads as false
    return str(value)
