"""Starter specs: a commented job spec for a model and a machine, with the numbers of a recipe."""

from __future__ import annotations

from hpc_rlhf.spec.stages import BASE, STAGE_KINDS, StageKind
from hpc_rlhf.spec.stages.recipes import Recipe, billions_in
from hpc_rlhf.spec.yaml_source import Mark, parse_yaml

_HEAD = """\
# {model} {what}, on {machine}.
# {origin}
#
#   hpc-rlhf check {file}     lists every error in it
#   hpc-rlhf plan {file}      shows the jobs
#   hpc-rlhf submit {file}    submits them to Slurm
name: {name}
# On a file system that all nodes share. A relative path starts at this file's folder.
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
  # Limit of one attempt: a stage that needs longer saves, requeues itself and resumes.
  time: "12:00:00"
  # Run on the first node before the ranks start.
  # setup: [module load cuda, source /path/to/venv/bin/activate]
  # container: {{runtime: apptainer, image: /path/to/image.sif}}

{data}
stages:
"""

_PAIRS = """\
data:
  sources:
    - {{path: Dahoas/rm-static, format: prompt-chosen-rejected}}
  # Shares of the conversations; none is used by two stages.
  split: {split}
  max_prompt_tokens: 256
  max_answer_tokens: 256

models:
  actor: {actor}
  # Also the initial critic. It must have the actor's tokenizer.
  reward: {reward}
"""

_QUESTIONS = """\
data:
  sources:
    # Columns that the format does not read reach the rewards: here answer, which ends with #### and a number.
    - path: openai/gsm8k
      subset: main
      format: prompt
      columns: {{prompt: question}}
      system: Think step by step, and write the final answer after "####".
  max_prompt_tokens: 512
  max_answer_tokens: 1024

models:
  # A chat model; a base model first needs an sft stage, from which grpo then starts.
  actor: {actor}
"""

_FIELD_COMMENTS = {
    "global_batch": "samples per step; the gradients of several passes are accumulated",
    "zero": "what is sharded over the GPUs: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights",
    "lora": "train low-rank adapters instead of all weights",
    "ema": "also export a moving average of the actor",
    "activation_checkpointing": "less memory, about a third more time",
    "group_size": "responses to each prompt, which are compared with each other",
    "kl_coef": "weight of the KL from the model that training starts from",
    "minibatches": "optimizer steps on each rollout, of global_batch samples each",
    "rollout": "vLLM generates the responses; make install-vllm installs it",
    "rewards": "what is right; see docs/rewards.md for others",
}


def write_starter(recipe: Recipe, *, actor: str, reward: str | None, name: str, file: str) -> str:
    """The text of a commented job spec to start from.

    Args:
        recipe: the numbers.
        actor: hub id or folder of the model to turn into a chat model.
        reward: the same for the reward model and the critic; None if the rewards are verified.
        name: name of the run.
        file: name of the spec's file, for its header.
    """
    kinds = [kind for kind in STAGE_KINDS if kind.name in recipe.stages]
    data = (_QUESTIONS if reward is None else _PAIRS).format(
        actor=_scalar(actor), reward=_scalar(reward), split=_scalar({kind.name: kind.share for kind in kinds})
    )
    text = _HEAD.format(
        model=actor,
        what="learns to answer GSM8K" if reward is None else "as a chat model",
        machine=recipe.machine,
        origin=_origin(recipe, billions_in(actor)),
        file=file,
        name=_scalar(name),
        folder=name,
        nodes=recipe.nodes,
        gpus=recipe.gpus_per_node,
        data=data,
    )
    explained: set[str] = set()
    blocks = [_stage(number, kind, recipe, explained) for number, kind in enumerate(kinds, 1)]
    return text + "\n".join(blocks)


def _origin(recipe: Recipe, billions: float | None) -> str:
    """Where the numbers come from, and whether they suit a model of this size."""
    origin = recipe.origin.format(billions=recipe.billions, machine=recipe.machine) + "."
    if recipe.trains_adapters and BASE.name in recipe.stages:
        origin += "\n# Adapters: ten times the rate of full fine-tuning, at alpha 32 (LoRA Without Regret, 2025)."
    if billions is None:
        return f"{origin}\n# The model's name does not give its size: check that they suit it."
    if not 1 / 1.6 <= billions / recipe.billions <= 1.6:
        return f"{origin}\n# Untested at {billions:g} billion: check that memory and learning rates suit it."
    return origin


def _stage(number: int, kind: StageKind, recipe: Recipe, explained: set[str]) -> str:
    fields = recipe.stages[kind.name]
    lines = [f"  # {number}. {kind.summary}", f"  {kind.name}:"]
    for key, value in fields.items():
        comment = _FIELD_COMMENTS.get(key) if key not in explained else None
        explained.add(key)
        line = f"    {key}: {_scalar(value)}"
        lines.append(f"{line:<34}  # {comment}" if comment else line)
    if "rollout" in kind.spec.model_fields and "rollout" not in fields:
        rollout = _scalar({"engine": "vllm", "tensor_parallel": recipe.gpus_per_node})
        lines.append(f"    # rollout: {rollout}  # vLLM generates the responses; see docs/rollouts.md")
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """A value in readable YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value < 0.01:
        digits, _, power = f"{value:.6e}".partition("e")
        # With a dot, because other YAML readers take 5e-5 for text.
        return f"{float(digits)}e{int(power)}"
    if isinstance(value, str) and parse_yaml(value, Mark("")).value != value:
        return f'"{value}"'  # such as `no`, which YAML reads as false
    return str(value)
