"""Proven settings: DeepSpeed-Chat's published numbers, by actor size and machine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

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
