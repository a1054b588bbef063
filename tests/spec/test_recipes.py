"""The specs in jobs/ are the output of `hpc-rlhf init`, which always writes valid specs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.stages.recipes import DEPLOYMENTS, billions_in, nearest
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


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("actor", ["gpt2", "a/b-0.1b", "a/b-7b", "a/b-70b", "/models/opt-13b", "no", "1e5"])
def test_every_starter_spec_is_valid(
    tmp_path: Path, deployment: str, actor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/opt-13b").mkdir(parents=True)
    actor = actor.replace("/models", str(tmp_path / "models"))
    recipe = nearest(deployment, billions_in(actor) or 1.3)
    spec = load_spec(write(tmp_path, write_starter(recipe, actor=actor, reward=actor, name="no", file="no.yaml")))
    assert (spec.models.actor, spec.name, spec.stage_names) == (actor, "no", ("sft", "reward", "ppo"))
    assert spec.slurm.ranks == recipe.nodes * recipe.gpus_per_node


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
