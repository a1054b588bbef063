"""The demo, whole: the model visibly learns to answer, to tell the better answer, and to prefer it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.observe.results import final_samples, read_report
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.train.data.demo import POLITE, facts

pytestmark = pytest.mark.train
CHECKOUT = Path(__file__).parents[1]
SECRET = "hf_0s3cr3t0ofthehub"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, str]:
    """`make demo`, and what it printed."""
    run = RunDir(tmp_path_factory.mktemp("demo") / "run")
    done = subprocess.run(
        [sys.executable, "-m", "hpc_rlhf.cli", "run", "jobs/tiny.yaml", "--set", f"run_dir={run.path}"],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL, env={**os.environ, "HF_TOKEN": SECRET},  # noqa: E501
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def measured(run: RunDir, stage: str) -> dict[str, Any]:
    return manifest.require(run.stage(stage).model, stage)["metrics"]  # type: ignore[no-any-return]


def test_sft_learns_to_answer(demo: tuple[RunDir, str]) -> None:
    numbers = measured(demo[0], "sft")
    assert numbers["perplexity_before"] > 100
    assert numbers["perplexity_after"] < 2


def test_the_reward_model_tells_the_better_answer(demo: tuple[RunDir, str]) -> None:
    assert measured(demo[0], "reward")["accuracy"] >= 0.9


def test_ppo_learns_to_prefer_it(demo: tuple[RunDir, str]) -> None:
    numbers = measured(demo[0], "ppo")
    assert numbers["reward_last"] > numbers["reward_first"] + numbers["reward_first_std"]
    assert numbers["kl_first"] == 0
    assert 0 < numbers["kl_last"] < 20


def test_the_evaluation_finds_it_better_beyond_chance(demo: tuple[RunDir, str]) -> None:
    """On held-out prompts, sampled: the reward rises although the model stays near SFT's."""
    report = read_report(demo[0])
    sft, ppo = report["models"]["sft"], report["models"]["ppo"]
    assert sft["perplexity"] < 2
    assert report["reward_accuracy"]["low"] > 0.8
    assert ppo["reward_gain"]["low"] > 1
    assert ppo["win_rate"]["low"] > 0.5
    assert 0 < ppo["kl"]["value"] < 20
    assert report["models"]["start"]["win_rate"]["high"] < 0.2
    assert sft["bleu"] > 40  # plain answers, as the data's mostly are
    assert "wins against sft" in demo[1]


def test_the_answers_read_so(demo: tuple[RunDir, str]) -> None:
    """Most of PPO's answers are right and polite; SFT's are right and mostly plain."""
    rows = final_samples(demo[0], "ppo")
    answers = {question: sentence for asked, sentence in facts() for question in asked}

    def right(row: dict[str, Any], key: str) -> bool:
        question = next(q for q in answers if q in row["prompt"])
        return answers[question] in row[key]

    def polite(row: dict[str, Any], key: str) -> bool:
        return any(style.replace("{}", "").strip() in row[key] for style in POLITE)

    assert len(rows) == 16
    assert sum(right(row, "sft_answer") for row in rows) >= 13
    assert sum(right(row, "answer") for row in rows) >= 12
    assert sum(polite(row, "answer") for row in rows) >= 13
    assert sum(polite(row, "sft_answer") for row in rows) <= 10


def test_it_ends_with_a_table_answers_and_what_to_try_next(demo: tuple[RunDir, str]) -> None:
    _, text = demo
    for word in (
        "sft",
        "reward",
        "ppo",
        "held-out perplexity",
        "held-out accuracy",
        "after SFT",
        "after PPO",
        "hpc-rlhf chat",
    ):
        assert word in text


def test_a_secret_of_the_environment_is_in_no_file_of_the_run(demo: tuple[RunDir, str]) -> None:
    files = [path for path in demo[0].path.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in demo[1]
