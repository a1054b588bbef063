"""A blend adds weighted rewards up, leaves out what does not apply, and stops or skips at a failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.rewards.blend import Blend, Part, Scores
from hpc_rlhf.train.rewards.exact import Exact, Format
from hpc_rlhf.train.rewards.text import Failure, FromText, Pattern, Score, TextBatch
from hpc_rlhf.train.runtime.world import World
from tests.train.worlds import Letters, alone, ids, on_ranks


@dataclass
class Given:
    """A source with scores ready; by rank, if there are several."""

    scores: Sequence[Score]

    def score(self, prompts: object, responses: object, columns: object) -> Sequence[Score]:
        return self.scores


def details(*parts: Part, responses: Sequence[str] = ("a", "b", "c")) -> Scores:
    rows = ids(*responses)
    return alone(lambda world: Blend(parts, Letters(), world).details(ids(*responses), rows, {}))


def test_the_total_is_the_weighted_sum_of_the_rewards_that_apply() -> None:
    first, second = Part("first", Given([1.0, None, None]), 2.0), Part("second", Given([3.0, -1.0, None]), 0.5)
    reported = Part("reported", Given([7.0, 7.0, 7.0]), 0.0)

    scores = details(first, second, reported)

    assert scores.total == [3.5, -0.5, None]
    assert scores.parts == {"first": [1.0, None, None], "second": [3.0, -1.0, None], "reported": [7.0, 7.0, 7.0]}
    assert scores.failed == [False, False, False]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e39, Failure("raised KeyError: 'x'")])
def test_a_failure_of_one_reward_takes_the_response_out(broken: Score) -> None:
    scores = details(Part("good", Given([1.0, 2.0, 3.0])), Part("bad", Given([1.0, broken, None]), skips=True))

    assert scores.failed == [False, True, False]
    assert scores.total == [2.0, None, 3.0]
    assert scores.parts["bad"] == [1.0, None, None]


def test_a_wrong_number_of_scores_takes_all_responses_out() -> None:
    assert details(Part("short", Given([1.0, 2.0]), skips=True)).failed == [True, True, True]


def test_a_failure_stops_all_ranks_with_the_reward_the_row_and_the_response() -> None:
    failing: Sequence[Score] = [1.0, Failure("raised KeyError: 'x'", RUN_FAILED)]

    def work(world: World) -> Scores:
        bad = Given(failing if world.rank == 1 else [1.0, 1.0])
        return Blend([Part("mine", bad)], Letters(), world).details(
            ids("What?", "Why?"), ids("yes", "because"), {"answer": ["no", "so"]}
        )

    errors = on_ranks(3, work)

    assert len({str(error) for error in errors}) == 1
    (error, *_) = errors
    assert isinstance(error, HpcRlhfError)
    assert error.exit_code == RUN_FAILED
    assert error.where == "reward mine"
    for part in ("raised KeyError: 'x'", "response 1 of rank 1", "'because'", "'Why?'", '{"answer": "so"}'):
        assert part in error.message


def test_the_first_rank_of_a_tensor_parallel_group_scores_for_all_of_it() -> None:
    asked = []

    def work(world: World) -> Sequence[Score]:
        class Reward:
            def judge(self, batch: TextBatch) -> list[Score]:
                asked.append(world.rank)
                return [float(world.rank), None, Failure("raised", 1)]

        return FromText(Reward(), Letters(), world).score(ids("a"), ids("b"), {})

    scores = on_ranks(4, work, tensor=2)

    assert sorted(asked) == [0, 2]
    assert scores == [[rank, None, Failure("raised", 1)] for rank in (0.0, 0.0, 2.0, 2.0)]


TAG = Pattern("<answer>(.*?)</answer>", 5)


def judged(reward: Any, columns: Mapping[str, Sequence[Any]], *responses: str) -> list[Score]:
    rows = ids(*responses)
    return alone(lambda world: FromText(reward, Letters(), world).score(rows, rows, columns))


def test_exact_compares_what_the_pattern_finds_last_with_the_column() -> None:
    answers = {"answer": ["7", 7, " seven ", None, "7"]}

    whole = judged(Exact("answer"), answers, " 7\n", "7", "seven", "7", "77")
    tagged = judged(
        Exact("answer", TAG), answers,
        "<answer>7</answer>", "<answer>8</answer> no, <answer>\n7 </answer>", "seven", "7", "<answer>7",
    )  # fmt: skip

    assert whole == [1.0, 1.0, 1.0, None, 0.0]
    assert tagged == [1.0, 1.0, 0.0, None, 0.0]


def test_a_column_that_the_data_lacks_is_named() -> None:
    with pytest.raises(HpcRlhfError, match="no column 'answer'; the rewards get question, level"):
        judged(Exact("answer"), {"question": ["?"], "level": [1]}, "7")


def test_format_matches_the_whole_response_over_lines() -> None:
    reward = Format(Pattern(".*<answer>.*</answer>", 5))
    assert judged(reward, {}, "think\n<answer>7</answer>", "<answer>7</answer>.", "7") == [1.0, 0.0, 0.0]


def test_an_expression_that_needs_exponential_time_scores_0() -> None:
    assert judged(Format(Pattern("(a|aa)+b", 0.1)), {}, "a" * 60) == [0.0]
    assert judged(Exact("answer", Pattern("(a|aa)+b", 0.1)), {"answer": ["a"]}, "a" * 60) == [0.0]
