"""Settings to start from, by actor and machine: DeepSpeed-Chat's for OPT, today's for other models."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import PurePath

DEPLOYMENTS = ("single_gpu", "single_node", "multi_node")


@dataclass(frozen=True)
class Recipe:
    """Settings for one actor size on one kind of machine.

    Attributes:
        billions: parameters of the actor that the batches were chosen for.
        origin: where the numbers come from, as a sentence.
    """

    billions: float
    deployment: str
    nodes: int
    gpus_per_node: int
    stages: dict[str, dict[str, object]]
    origin: str = "Hyperparameters from DeepSpeed-Chat, {billions:g} billion parameters on {machine}"

    @property
    def machine(self) -> str:
        if self.deployment == "single_gpu":
            return "one GPU"
        nodes = "one node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{nodes} of {self.gpus_per_node} GPUs"

    @property
    def trains_adapters(self) -> bool:
        return any("lora" in stage for stage in self.stages.values())


# Numbers without another source are those of DeepSpeed-Chat's scripts, in applications/DeepSpeed-Chat/training of
# github.com/microsoft/DeepSpeedExamples at 83757d9c; what a script leaves out is the default of the main.py beside it.
# STEP1, STEP2 and STEP3 are step1_supervised_finetuning, step2_reward_model_finetuning and step3_rlhf_finetuning, each
# with /training_scripts/opt. Its warm-up (none, none, 100 steps) is not copied: see the defaults of `warmup`.

# STEP1's and STEP3's --lora_dim and --actor_lora_dim. Their --learning_rate is for the weights without adapters, which
# we freeze; adapters have --lora_learning_rate, 5e-4, and dschat/utils/module/lora.py scales them by 1 / rank and draws
# A from +-1 / sqrt(rank), where peft and we draw it from +-1 / sqrt(inputs). Instead of them we take alpha 32 and ten
# times the rate of full fine-tuning (Schulman et al., LoRA Without Regret, 2025): 10 * 9.65e-6. The first step of an
# adapter is then 0.4 to 1.6 times as large as with DeepSpeed-Chat's settings.
_LORA = {"lora": {"rank": 128, "alpha": 32}}
_LORA_RATE = 1e-4
# STEP2/*/run_350m.sh, for OPT-350m.
_REWARD = {"epochs": 1, "lr": 5e-5, "weight_decay": 0.1, "zero": 0}
# --critic_learning_rate of all scripts in STEP3, and --actor_learning_rate of those without adapters.
_PPO_FULL = {"epochs": 1, "actor_lr": 9.65e-6, "critic_lr": 5e-6}
_PPO_LORA = {"epochs": 1, "actor_lr": _LORA_RATE, "critic_lr": 5e-6}
# vLLM needs the new weights for every rollout, so a rollout serves two optimizer steps of 512 samples: it has the 1,024
# with which DeepSpeed-Chat's published times were measured (blogs/deepspeed-chat of github.com/microsoft/DeepSpeed; the
# script has micro-batches of 4, and so 256). The layout is the fastest by `plan` that also fits GPUs of 40 GB.
_VLLM_66B = {"micro_batch": 8, "minibatches": 2, "rollout": {"engine": "vllm", "tensor_parallel": 8, "gpu_memory": 0.5}}
# Rollouts of 256 responses (N+ has 512, see `_of_today`), in the layout that is fastest by `plan`.
_VLLM_8B = {"minibatches": 8, "rollout": {"engine": "vllm", "tensor_parallel": 4}}
# --gradient_checkpointing of STEP1, --actor_gradient_checkpointing of STEP3; ours also covers the critic.
_RECOMPUTE = {"activation_checkpointing": True}

# fmt: off
RECIPES = (
    Recipe(
        1.3, "single_gpu", nodes=1, gpus_per_node=1,
        stages={
            # STEP1/single_gpu/run_1.3b.sh
            "sft": {"epochs": 1, "lr": _LORA_RATE, "micro_batch": 16, "global_batch": 128, "zero": 0, **_LORA},
            # STEP2/single_gpu/run_350m.sh
            "reward": {**_REWARD, "micro_batch": 16, "global_batch": 64},
            # STEP3/single_gpu/run_1.3b.sh
            "ppo": {**_PPO_LORA, "micro_batch": 16, "global_batch": 32, "zero": 0, **_LORA, **_RECOMPUTE},
        },
    ),
    Recipe(
        1.3, "single_node", nodes=1, gpus_per_node=8,
        stages={
            # STEP1/single_node/run_1.3b.sh
            "sft": {"epochs": 16, "lr": 9.65e-6, "micro_batch": 8, "zero": 2},
            # STEP2/single_node/run_350m.sh
            "reward": {**_REWARD, "micro_batch": 4},
            # STEP3/single_node/run_1.3b.sh
            "ppo": {**_PPO_FULL, "micro_batch": 4, "zero": 2, "ema": True},
        },
    ),
    Recipe(
        6.7, "single_node", nodes=1, gpus_per_node=8,
        stages={
            # STEP1/single_node/run_6.7b.sh
            "sft": {"epochs": 16, "lr": 9.65e-6, "micro_batch": 6, "zero": 3, **_RECOMPUTE},
            # STEP2/single_node/run_350m.sh
            "reward": {**_REWARD, "micro_batch": 4},
            # STEP3/single_node/run_6.7b.sh
            "ppo": {**_PPO_FULL, "micro_batch": 4, "weight_decay": 0.1, "zero": 3, **_RECOMPUTE},
        },
    ),
    Recipe(
        13.0, "single_node", nodes=1, gpus_per_node=8,
        stages={
            # STEP1/single_node/run_13b.sh
            "sft": {"epochs": 16, "lr": _LORA_RATE, "micro_batch": 4, "zero": 3, **_LORA, **_RECOMPUTE},
            # STEP2/single_node/run_350m.sh
            "reward": {**_REWARD, "micro_batch": 4},
            # STEP3/single_node/run_13b.sh
            "ppo": {**_PPO_LORA, "micro_batch": 16, "zero": 3, **_LORA, **_RECOMPUTE},
        },
    ),
    Recipe(
        66.0, "multi_node", nodes=8, gpus_per_node=8,
        stages={
            # STEP1/multi_node/run_66b.sh
            "sft": {
                "epochs": 2, "lr": _LORA_RATE, "micro_batch": 4, "weight_decay": 0.1, "zero": 3, **_LORA, **_RECOMPUTE,
            },
            # STEP2/multi_node/run_350m.sh
            "reward": {**_REWARD, "micro_batch": 2},
            # STEP3/multi_node/run_66b.sh
            "ppo": {
                **_PPO_LORA, "weight_decay": 0.1, "zero": 3, **_LORA, **_RECOMPUTE, **_VLLM_66B,
            },
        },
    ),
)

# verl's scripts in examples/grpo_trainer of github.com/volcengine/verl at b178a3cd, which train on GSM8K. Its batches
# count prompts, ours responses. The schedule, betas and decay are the defaults in verl/trainer/config/optim/fsdp.yaml.
_VERL = {
    "schedule": "constant", "warmup": 0, "weight_decay": 0.01, "betas": [0.9, 0.999], **_RECOMPUTE,
    "group_size": 5, "kl_coef": 0.001, "rewards": [{"math": "answer"}],
}
_VERL_ORIGIN = "Hyperparameters from verl's example for GSM8K, {billions:g} billion parameters"
_VERL_REPORTS = (
    "Hyperparameters from verl's example for GSM8K, with 3 billion parameters. For adapters of rank 32, it reports\n"
    "# 78 % of the test questions for Qwen2.5-1.5B-Instruct, and 86 % for 3B (its docs/algo/baseline.md)"
)
GRPO_RECIPES = (
    # run_qwen2_5-3b_gsm8k_grpo_lora.sh
    Recipe(
        2.0, "single_gpu", nodes=1, gpus_per_node=1, origin=_VERL_REPORTS,
        stages={
            "grpo": {
                "epochs": 15, "lr": 3e-6, "micro_batch": 8, "global_batch": 80, "zero": 0,
                "lora": {"rank": 64, "alpha": 32}, **_VERL,
            },
        },
    ),
    # run_qwen3-8b.sh
    Recipe(
        8.0, "single_node", nodes=1, gpus_per_node=8, origin=_VERL_ORIGIN,
        stages={
            "grpo": {
                "epochs": 15, "lr": 1e-6, "micro_batch": 4, "global_batch": 1280, "minibatches": 4, "zero": 3, **_VERL,
            },
        },
    ),
    # run_qwen2_5_32b_grpo_npu.sh, on 32 accelerators
    Recipe(
        32.0, "multi_node", nodes=4, gpus_per_node=8, origin=_VERL_ORIGIN,
        stages={
            "grpo": {
                "epochs": 15, "lr": 1e-6, "micro_batch": 2, "global_batch": 640, "minibatches": 8, "zero": 3, **_VERL,
            },
        },
    ),
)
# fmt: on


def grpo_recipe(deployment: str) -> Recipe:
    """The settings to start from with GRPO on this kind of machine."""
    return next(recipe for recipe in GRPO_RECIPES if recipe.deployment == deployment)


def recipe_for(deployment: str, actor: str, reward: str) -> Recipe:
    """The settings to start from with PPO: DeepSpeed-Chat's for OPT models, today's for others.

    Args:
        actor, reward: hub ids or folders, whose names may contain the models' sizes.
    """
    billions = billions_in(actor)
    recipe = nearest(deployment, billions or 1.3)
    if PurePath(actor).name.lower().startswith("opt-"):
        return recipe
    by_vllm = re.search("llama|qwen[23]", PurePath(actor).name.lower()) is not None  # the families tested with it
    return _of_today(recipe, billions or 1.3, billions_in(reward) or billions or 1.3, by_vllm)


def _of_today(recipe: Recipe, billions: float, reward_billions: float, by_vllm: bool) -> Recipe:
    """A recipe for models that are trained on more tokens than OPT: fewer epochs and lower rates on the same machine.

    Adapters have ten times the rates of full fine-tuning, as above.
    """
    times = 10 if recipe.trains_adapters else 1
    # Tülu 3 (arXiv 2411.15124; docs/tulu3.md of github.com/allenai/open-instruct): 2 epochs at 5e-6 for 8B and 2e-6 for
    # 70B. DeepSpeed-Chat's rate below 2B, where Tülu 3 has no model.
    sft_lr = 9.65e-6 if billions < 2 else 5e-6 if billions < 30 else 2e-6
    # TRL's examples/scripts/reward_modeling.py for Qwen2-0.5B; Tülu 3's reward model of 8B.
    reward_lr = 1e-5 if reward_billions < 2 else 3e-6
    # arXiv 2403.17031 (The N+ Implementation Details of RLHF with PPO), for 1B to 6.9B: actor, critic and KL penalty.
    ppo = {"actor_lr": 3e-6 * times, "critic_lr": 3e-6, "kl_coef": 0.05}
    stages = {
        name: {key: value for key, value in fields.items() if key != "weight_decay"}  # all of these have none
        for name, fields in recipe.stages.items()
    }
    epochs = recipe.stages["sft"]["epochs"]
    stages["sft"].update(epochs=1 if epochs == 1 else 2, lr=sft_lr * times)
    stages["reward"].update(lr=reward_lr)
    stages["ppo"].update(ppo)
    if not by_vllm:
        stages["ppo"].pop("rollout", None)
    elif "rollout" not in stages["ppo"] and recipe.deployment != "single_gpu" and recipe.billions > 2:
        stages["ppo"].update(_VLLM_8B)
    origin = (
        "Epochs and learning rates from Tülu 3, TRL and arXiv 2403.17031 (N+).\n"
        "# Batches from DeepSpeed-Chat, {billions:g} billion parameters on {machine}"
    )
    return replace(recipe, stages=stages, origin=origin)


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
