"""The specs in jobs/ are the output of `hpc-rlhf init`, which always writes valid specs."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.estimate.stage_memory import Memory, run_memory
from hpc_rlhf.spec.batch import derive_batch
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.stages.recipes import DEPLOYMENTS, RECIPES, billions_in, grpo_recipe, nearest, recipe_for
from hpc_rlhf.spec.starter import write_starter
from tests.spec.texts import JOBS, write

ROOT = JOBS.parent


def init(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "init", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("job", "actor", "reward", "deployment"),
    [
        ("opt-1.3b", "facebook/opt-1.3b", "facebook/opt-350m", "single_gpu"),
        ("opt-6.7b", "facebook/opt-6.7b", "facebook/opt-350m", "single_node"),
        ("opt-13b", "facebook/opt-13b", "facebook/opt-350m", "single_node"),
        ("opt-66b", "facebook/opt-66b", "facebook/opt-350m", "multi_node"),
        ("qwen3-8b", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-0.6B-Base", "single_node"),
    ],
)
def test_job_is_what_init_writes(job: str, actor: str, reward: str, deployment: str) -> None:
    done = init("--actor", actor, "--reward", reward, "--deployment", deployment, "--name", job, "--out", "-")
    written = (JOBS / f"{job}.yaml").read_text()
    assert done.stdout == written.replace(f"jobs/{job}.yaml", "FILE")


@pytest.mark.parametrize(
    ("job", "actor", "deployment"),
    [
        ("gsm8k-qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", "single_gpu"),
        ("gsm8k-qwen3-8b", "Qwen/Qwen3-8B", "single_node"),
    ],
)
def test_job_with_verified_answers_is_what_init_writes(job: str, actor: str, deployment: str) -> None:
    done = init("--algorithm", "grpo", "--actor", actor, "--deployment", deployment, "--name", job, "--out", "-")
    written = (JOBS / f"{job}.yaml").read_text()
    assert done.stdout == written.replace(f"jobs/{job}.yaml", "FILE")


def test_init_asks_on_a_terminal_for_what_is_missing() -> None:
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "hpc_rlhf.cli", "init", "--out", "-"]
    process = subprocess.Popen(command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    os.write(mine, b"facebook/opt-1.3b\nfacebook/opt-350m\nlaptop\nsingle_gpu\n")
    text, _ = process.communicate(timeout=60)
    os.close(mine)
    os.close(theirs)
    assert process.returncode == 0
    assert text == (JOBS / "opt-1.3b.yaml").read_text().replace("jobs/opt-1.3b.yaml", "FILE")


def test_without_a_terminal_a_missing_option_is_an_error(tmp_path: Path) -> None:
    for words, missing in (((), "--actor"), (("--actor", "a/b"), "--deployment")):
        done = init(*words)
        assert (done.returncode, f"Missing option '{missing}'" in done.stderr) == (2, True)


@pytest.mark.parametrize(("options", "job"), [([], "tiny.yaml"), (["--algorithm", "grpo"], "tiny-grpo.yaml")])
def test_the_demo_needs_no_clone(tmp_path: Path, options: list[str], job: str) -> None:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "init", "--demo", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "wrote demo.yaml; next: hpc-rlhf run demo.yaml\n")
    assert (tmp_path / "demo.yaml").read_text() == (JOBS / job).read_text()


def test_init_refuses_options_that_do_not_belong_together() -> None:
    assert init("--demo", "--name", "x").returncode == 2
    assert init("--algorithm", "grpo", "--actor", "x", "--reward", "y", "--deployment", "single_gpu").returncode == 2


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("actor", ["gpt2", "a/b-0.1b", "a/b-7b", "a/b-70b", "/models/opt-13b", "no", "1e5"])
def test_every_starter_spec_is_valid(
    tmp_path: Path, deployment: str, actor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/opt-13b").mkdir(parents=True)
    actor = actor.replace("/models", str(tmp_path / "models"))
    recipe = recipe_for(deployment, actor, actor)
    spec = load_spec(write(tmp_path, write_starter(recipe, actor=actor, reward=actor, name="no", file="no.yaml")))
    assert (spec.models.actor, spec.name, spec.stage_names) == (actor, "no", ("sft", "reward", "ppo"))
    assert spec.slurm.ranks == recipe.nodes * recipe.gpus_per_node


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_every_starter_spec_of_grpo_is_valid(tmp_path: Path, deployment: str) -> None:
    recipe = grpo_recipe(deployment)
    spec = load_spec(write(tmp_path, write_starter(recipe, actor="a/b-7b", reward=None, name="x", file="x.yaml")))
    stage = spec.stage("grpo")
    batch = derive_batch(stage, "grpo")
    assert batch.micro * batch.accumulation * stage.minibatches % stage.group_size == 0, "groups stay on a rank"
    assert (spec.stage_names, spec.slurm.ranks) == (("grpo",), recipe.nodes * recipe.gpus_per_node)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("facebook/opt-1.3b", 1.3), ("opt-350m", 0.35), ("Qwen/Qwen3-8B-Base", 8), ("Mixtral-8x7B", 56), ("gpt2", None), ("a-0b", None), ("web-b2", None)],  # noqa: E501
)  # fmt: skip
def test_parameters_from_a_model_name(name: str, billions: float | None) -> None:
    assert billions_in(name) == billions


def test_init_does_not_overwrite_and_marks_untested_sizes(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    args = ("--actor", "a/b-13b", "--deployment", "single_gpu", "--out", str(out))
    assert init(*args).returncode == 0
    before = out.read_text()
    assert "Untested at 13 billion" in before
    again = init(*args)
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {out}: the file already exists")
    assert out.read_text() == before


@pytest.mark.parametrize("args", [("--actor", "a b"), ("--actor", "a\nb: c"), ("--actor", "x", "--name", "..")])
def test_init_rejects_invalid_names(args: tuple[str, ...]) -> None:
    done = init(*args, "--deployment", "single_gpu", "--out", "-")
    assert (done.returncode, done.stdout) == (2, "")


def test_only_opt_models_get_the_epochs_and_rates_of_deepspeed_chat() -> None:
    ours, theirs = recipe_for("single_node", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-0.6B-Base"), nearest("single_node", 8)
    assert recipe_for("single_node", "facebook/opt-6.7b", "facebook/opt-350m") == theirs
    assert theirs.stages["sft"]["epochs"] == 16
    assert ours.stages["sft"]["epochs"] == 2
    assert "DeepSpeed-Chat" in theirs.origin
    assert "learning rates from Tülu 3" in ours.origin
    large = recipe_for("single_node", "a/b-8b", "a/b-8b").stages["reward"]["lr"]
    assert large < ours.stages["reward"]["lr"] < theirs.stages["reward"]["lr"]  # type: ignore[operator]


def test_what_deepspeed_chats_scripts_say_is_kept() -> None:
    """Weight decay and activation checkpointing of SFT and PPO, by billions of parameters and deployment."""
    kept = {
        (recipe.billions, recipe.deployment): tuple(
            (stage.get("weight_decay", 0.0), stage.get("activation_checkpointing", False))
            for stage in (recipe.stages["sft"], recipe.stages["ppo"])
        )
        for recipe in RECIPES
    }
    assert kept == {
        (1.3, "single_gpu"): ((0.0, False), (0.0, True)),
        (1.3, "single_node"): ((0.0, False), (0.0, False)),
        (6.7, "single_node"): ((0.0, True), (0.1, True)),
        (13.0, "single_node"): ((0.0, True), (0.0, True)),
        (66.0, "multi_node"): ((0.1, True), (0.1, True)),
    }


@pytest.mark.parametrize("job", ["opt-1.3b", "opt-6.7b", "opt-13b", "opt-66b", "opt-1.3b-dpo"])
def test_every_job_fits_on_gpus_of_40_gb(job: str) -> None:
    for stage, memory in run_memory(load_spec(JOBS / f"{job}.yaml", ["slurm.gpu=a100-40g"])).items():
        assert isinstance(memory, Memory), memory
        assert memory.fits, stage


@pytest.mark.parametrize("job", sorted(path.stem for path in JOBS.glob("*.yaml")))
def test_warm_ups_of_jobs_are_fractions(job: str) -> None:
    spec = load_spec(JOBS / f"{job}.yaml")
    assert all(spec.stage(name).model_dump()["warmup"] <= 0.1 for name in spec.trained)
