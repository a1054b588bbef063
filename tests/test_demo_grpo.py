"""The demo of GRPO in a short form: its reward checks the result, and its chain runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.observe.results import final_samples
from hpc_rlhf.run import manifest
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.train.data import arithmetic
from hpc_rlhf.train.rewards.exact import Exact
from hpc_rlhf.train.rewards.text import Pattern, TextBatch
from tests.demos import CHECKOUT, short_grpo

JOB = CHECKOUT / "jobs" / "tiny-grpo.yaml"


def test_the_reward_is_whether_the_result_is_right() -> None:
    (item,) = load_spec(JOB).stages.grpo.rewards
    rows = list(arithmetic.problems(300, 1))
    responses = [f" {row['chosen']}" for row in rows]
    batch = TextBatch([""] * 300, responses, [[]] * 300, {"answer": [row["answer"] for row in rows]})
    scores = Exact(item.exact, Pattern(item.format, item.limit)).judge(batch)
    right = [": " in row["chosen"] or row["chosen"] == f"about {row['answer']}" for row in rows]
    assert scores == right
    assert 90 < sum(right) < 150


@pytest.mark.train
def test_the_chain_runs_from_scratch(tmp_path: Path) -> None:
    run = short_grpo(tmp_path, "max_steps=2")
    assert manifest.require(run.stage("grpo").model, "grpo")["step"] == 2
    assert len(final_samples(run, "grpo")) == 16
