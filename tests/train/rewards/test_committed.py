"""Scores that vary are asked for once, whatever happens to the attempt, and on other ranks too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.checkpoint.store import CheckpointStore
from hpc_rlhf.train.rewards.blend import Blend, Part
from hpc_rlhf.train.rewards.committed import CommittedScores
from hpc_rlhf.train.rewards.text import Failure, Score
from hpc_rlhf.train.runtime.world import World
from tests.train.worlds import Letters, ids, on_ranks

# The same response twice to a prompt, and the prompt twice in a step.
PROMPTS = ["p", "p", "p", "p", "q", "q", "p", "p", "q", "q", "q", "q"]
RESPONSES = ["a", "a", "b", "a", "a", "c", "a", "b", "a", "a", "c", "d"]


@dataclass
class Judge:
    """A reward that never gives a score twice."""

    numbers: Any = field(default_factory=count)
    fails: bool = False
    asked: int = 0

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
    ) -> list[Score]:
        self.asked += len(responses)
        assert all(len(column) == len(responses) for column in columns.values())
        return [Failure("raised", 1) if self.fails else next(self.numbers) / 3 for _ in responses]


def attempt(
    folder: Path, ranks: int, judge: Judge, step: int = 4, responses: Sequence[str] = RESPONSES, skips: bool = False,
    name: str = "1", claims: bool = True, tensor: int = 1,
) -> list[float | None]:  # fmt: skip
    """The scores that an attempt gets for a step, in the order of the prompts. It asks in two calls, as GRPO may."""

    def work(world: World) -> list[list[float | None]]:
        store = CheckpointStore(folder / "checkpoints", name, 2, world)
        if claims:
            store.claim()
        parts = [Part("judge", judge, skips=skips, varies=True)]
        blend = Blend(parts, Letters(), world, CommittedScores(folder / "rewards", store, world))
        blend.begin(step, "rollout")
        half, share = len(PROMPTS) // 2, len(PROMPTS) // 2 // world.dims.data
        scores = []
        for call in (0, half):
            rows = slice(call + world.data_rank * share, call + (world.data_rank + 1) * share)
            columns = {"answer": list(range(share))}
            scores.append(blend.score(ids(*PROMPTS[rows]), ids(*responses[rows]), columns if tensor > 1 else {}))
        return scores

    results: list[Any] = on_ranks(ranks, work, tensor)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [score for call in (0, 1) for result in results[::tensor] for score in result[call]]


@pytest.mark.parametrize("later", [1, 2, 3, 6])
def test_an_attempt_on_any_number_of_ranks_gets_the_scores_of_the_first(tmp_path: Path, later: int) -> None:
    judge = Judge()
    first = attempt(tmp_path, 2, judge)
    assert judge.asked == len(set(first)) == len(PROMPTS)

    assert attempt(tmp_path, later, judge) == first
    assert judge.asked == len(PROMPTS)


def test_the_ranks_of_a_tensor_parallel_group_have_the_same_scores(tmp_path: Path) -> None:
    class Alike(Judge):
        def score(self, prompts: Any, responses: Any, columns: Any) -> list[Score]:
            return [float(len(prompts) + sum(response)) for response in responses]

    first = attempt(tmp_path, 4, Alike(), tensor=2)
    assert attempt(tmp_path, 2, Judge(), tensor=1, step=5) != first
    assert attempt(tmp_path, 4, Judge(), tensor=2) == first


def test_another_step_or_another_response_is_scored_again(tmp_path: Path) -> None:
    judge = Judge()
    first = attempt(tmp_path, 2, judge)
    assert not set(attempt(tmp_path, 2, judge, step=5)) & set(first)
    changed_responses = [*RESPONSES[:2], "z", *RESPONSES[3:]]
    changed = attempt(tmp_path, 2, judge, responses=changed_responses)
    # The rank with another response asks about its whole batch: its function may compare them.
    assert [new == old for new, old in zip(changed, first, strict=True)] == [False] * 3 + [True] * 9
    assert attempt(tmp_path, 1, judge, responses=changed_responses) == changed


def test_a_line_that_was_not_written_completely_is_scored_again(tmp_path: Path) -> None:
    judge = Judge()
    first = attempt(tmp_path, 2, judge)
    (file,) = (tmp_path / "rewards").iterdir()
    file.write_bytes(file.read_bytes()[:-40])

    again = attempt(tmp_path, 2, judge)

    assert again[:6] == first[:6]
    assert not set(again[6:]) & set(first)
    assert attempt(tmp_path, 2, judge) == again


def test_failures_are_scores_only_where_they_are_skipped(tmp_path: Path) -> None:
    broken = Judge(fails=True)
    with pytest.raises(HpcRlhfError, match="raised"):
        attempt(tmp_path, 1, broken)
    assert None not in attempt(tmp_path, 1, Judge())

    assert attempt(tmp_path, 1, broken, step=5, skips=True) == [None] * len(PROMPTS)
    assert attempt(tmp_path, 1, Judge(), step=5, skips=True) == [None] * len(PROMPTS)


def test_scores_are_kept_as_long_as_a_checkpoint_needs_them(tmp_path: Path) -> None:
    for step in (4, 5, 6):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    for step in (3, 4, 5, 6):
        attempt(tmp_path, 1, Judge(), step=step)
    assert sorted(file.name[:8] for file in (tmp_path / "rewards").iterdir()) == ["00000004", "00000005", "00000006"]


def test_an_attempt_that_lost_the_stage_writes_no_scores(tmp_path: Path) -> None:
    attempt(tmp_path, 1, Judge(), name="2")
    with pytest.raises(HpcRlhfError, match="attempt 1 no longer owns this stage"):
        attempt(tmp_path, 1, Judge(), step=5, name="1", claims=False)
