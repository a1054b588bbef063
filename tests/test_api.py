"""PPO and GRPO in a program: those of docs/api.md run, and their steps are the stages' own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.launch.local.environment import free_port
from tests.train import tiny
from tests.train.ranks import rank_environment

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.train

ERRORS = """
import json, sys
from hpc_rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
from hpc_rlhf.errors import HpcRlhfError

sft, reward = "jobs/runs/tiny/stages/sft/model", "jobs/runs/tiny/stages/reward/model"
errors = []

def expect_error(make):
    try:
        make()
    except HpcRlhfError as error:
        errors.append(str(error))

expect_error(lambda: DeepSpeedRLHFEngine(sft, reward, args={"lr": 1e-5}))
expect_error(lambda: DeepSpeedRLHFEngine(sft, reward, args={"max_steps": 5}))
expect_error(lambda: DeepSpeedRLHFEngine("/nowhere", reward))
expect_error(lambda: DeepSpeedRLHFEngine(sft, sft))
engine = DeepSpeedRLHFEngine(
    sft, reward,
    args={"minibatches": 2, "micro_batch": 2, "precision": "fp32", "actor_lr": 1e-3, "warmup": 0},
    max_prompt_tokens=24, max_answer_tokens=8, num_total_iters=2,
)
trainer = DeepSpeedPPOTrainer(engine=engine)
expect_error(lambda: trainer.generate_experience(["one"]))
text = "\\n\\nHuman: Hi?\\n\\nAssistant:"
questions = ["Hi?", text, engine.tokenizer(text)["input_ids"], "?" * 99]
experience = trainer.generate_experience(questions)
trainer.train_rlhf(experience)
first = dict(trainer.metrics)
trainer.train_rlhf(trainer.generate_experience(questions))
print(json.dumps([errors, experience.rollout.prompts, experience.rollout.responses, first, trainer.metrics]))
"""


TWO_RANKS = """
import json, os
from hpc_rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
from hpc_rlhf.errors import HpcRlhfError

engine = DeepSpeedRLHFEngine(
    "jobs/runs/tiny/stages/sft/model", "jobs/runs/tiny/stages/reward/model",
    args={"zero": 3, "micro_batch": 2, "precision": "fp32", "warmup": 0, "ema": True, "lora": {"rank": 4}},
    max_answer_tokens=8, num_total_iters=2,
)
trainer = DeepSpeedPPOTrainer(engine=engine)
rank = engine.world.rank
refused = ""
try:
    trainer.generate_experience(["Hi?"] * (1 + rank))
except HpcRlhfError as error:
    refused = error.message
experience = trainer.generate_experience(["Hi?", f"Who is {rank}?"])
losses = trainer.train_rlhf(experience)
engine.save_pretrained("two")
print(json.dumps([refused, losses, experience.rollout.responses[0]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fine-tuned model and the reward model of a run."""
    from hpc_rlhf.train.models.export import export

    folder = tmp_path_factory.mktemp("program")
    stages, tokenizer = folder / "jobs" / "runs" / "tiny" / "stages", tiny.tokenizer()
    fields = {"vocab_size": 300, "max_position_embeddings": 512}
    export(tiny.causal("llama", **fields), tokenizer, stages / "sft" / "model", is_main=True)
    export(tiny.classifier("llama", **fields), tokenizer, stages / "reward" / "model", is_main=True)
    return folder


def run(program: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_documented_programs_run(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    program, grpo = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), flags=re.DOTALL)
    lines = [line.split() for line in run(program, folder).splitlines() if line]
    numbers = [list(map(float, line)) for line in lines if len(line) == 4]
    assert len(numbers) == 2
    assert abs(numbers[0][3]) < 1e-3, "the actor starts as the reference"
    AutoModelForCausalLM.from_pretrained(folder / "actor")
    lines = [line.split() for line in run(grpo, folder).splitlines() if line]
    steps = [list(map(float, line)) for line in lines if len(line) == 3]
    assert len(steps) == 2
    assert all(0 <= reward <= 1 and 0 <= flat <= 1 for _, reward, flat in steps)


def test_a_program_brings_its_own_reward(folder: Path) -> None:
    printed = run((ROOT / "examples" / "own_reward.py").read_text(), folder)
    numbers = [list(map(float, line.split())) for line in printed.splitlines() if len(line.split()) == 2]
    assert len(numbers) == 2
    for reward, tokens in numbers:
        assert reward == pytest.approx(1 - tokens / 256)


def test_errors_are_clear_and_prompts_have_three_forms(folder: Path) -> None:
    errors, prompts, responses, first, second = json.loads(run(ERRORS, folder).splitlines()[-1])
    for text, words in zip(
        errors,
        ["args: lr: Extra inputs", "max_steps is for the ppo stage", "no tokenizer could be loaded",
         "is no reward model", "1 prompts cannot be divided into equal minibatches"],
        strict=True,
    ):  # fmt: skip
        assert words in text
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(prompts[3]) == 24
    assert all(0 < len(answer) <= 8 for answer in responses)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-6, "it learns"
    assert {"reward", "actor_loss", "critic_loss", "clipfrac", "explained_variance"} <= set(first)


def test_two_ranks_learn_together(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        for environment in rank_environment(2, free_port())
    ]
    try:
        said = [json.loads(process.communicate(timeout=240)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    (refused, losses, answer), (also_refused, other_losses, other_answer) = said
    assert refused == also_refused == "1 and 2 prompts cannot be divided into equal minibatches on every rank"
    assert losses == other_losses, "they are over all ranks"
    assert answer != other_answer, "every rank samples the same prompt with its own random numbers"
    for name in ("two", "two/ema"):
        AutoModelForCausalLM.from_pretrained(folder / name)


def test_the_package_itself_loads_no_torch() -> None:
    code = "import sys, hpc_rlhf; hpc_rlhf.__version__; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
