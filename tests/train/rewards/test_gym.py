"""The scorers of reasoning-gym score what their own source generated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import pytest

from hpc_rlhf.spec.rewards import RewardItem
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.train.data.gym import COLUMN
from hpc_rlhf.train.data.sources import read
from hpc_rlhf.train.rewards import gym
from hpc_rlhf.train.rewards.text import Pattern, Score, TextBatch
from hpc_rlhf.train.rewards.verifier import Verifier
from hpc_rlhf.train.rewards.workers import Pool


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[bool, Pool]]:
    pools = {
        selected: Pool("hpc_rlhf.train.rewards.gym:make", {"selected": selected}, size=1, timeout=60, memory=gym.MEMORY)
        for selected in (False, True)
    }
    yield pools
    for pool in pools.values():
        pool.close()


@cache
def entry_of(task: str) -> str:
    source = SourceSpec.model_validate({"reasoning_gym": {"task": task, "size": 10}})
    return json.dumps(next(read(source, 1)).further[COLUMN])


def scores(pools: dict[bool, Pool], task: str, *answers: str, selects: str | None = None) -> list[Score]:
    """The scores of answers to one problem; TRUTH stands for the right one. The last row is of another source."""
    entry = json.loads(entry_of(task))
    responses = [answer.replace("TRUTH", entry["answer"]) for answer in (*answers, "TRUTH")]
    cells = [*[entry] * len(answers), None]
    batch = TextBatch([""] * len(cells), responses, [[]] * len(cells), {COLUMN: cells})
    pattern = Pattern(selects, 5) if selects else None
    return Verifier("reasoning_gym", COLUMN, pools[selects is not None], pattern).judge(batch)


def test_an_answer_between_tags_or_the_whole_response_is_scored(pools: dict[bool, Pool]) -> None:
    texts = ["TRUTH", " TRUTH\n", "I say <answer>1</answer>, no, <answer> TRUTH </answer>!", "<answer>x</answer> TRUTH"]
    assert scores(pools, "chain_sum", *texts, "x", "") == [1, 1, 1, 0, 0, 0, None]


def test_a_format_selects_the_answer(pools: dict[bool, Pool]) -> None:
    texts = ["So = TRUTH", "So\n= TRUTH", "TRUTH", "<answer>TRUTH</answer>"]
    assert scores(pools, "chain_sum", *texts, selects="= ([0-9-]*)") == [1, 1, 0, 0, None]
    assert RewardItem(reasoning_gym=True, format="= (.*)").kind == "reasoning_gym"


def test_partial_scores_and_answers_that_break_a_scorer(pools: dict[bool, Pool]) -> None:
    right, broken, other = scores(pools, "prime_factorization", "TRUTH", "x")
    assert (right, broken, other) == (1, 0, None)
    (partial, other) = scores(pools, "word_sorting", "x")
    assert 0 <= float(partial or 0) < 1  # type: ignore[arg-type]
