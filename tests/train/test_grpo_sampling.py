"""GRPO's dynamic sampling: which prompts are sampled, and which of them are used."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc_rlhf.spec.stages import GrpoSpec
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.rewards.blend import Scores
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.stages.grpo.sampling import Sampler

REWARDS: list[dict[str, Any]] = [{"exact": "answer"}]
ROWS = 40


class Ranks:
    """Threads that meet, each a rank of a world."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.values = count, threading.Barrier(count), [None] * count

    def world(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self.barrier.wait(30)
            self.values[rank] = value
            self.barrier.wait(30)
            values = list(self.values)
            self.barrier.wait(30)
            return values

        def sums(numbers: Mapping[str, float]) -> dict[str, float]:
            parts = gather(numbers)
            return {name: sum(each[name] for each in parts) for name in numbers}

        dims = SimpleNamespace(data=self.count)
        return SimpleNamespace(
            data_rank=rank, dims=dims, device=torch.device("cpu"), gather_data=gather, sums=sums, rank=rank
        )


def sampled(ranks: int, step_count: int, minibatches: int, seed: int, most: int) -> list[list[list[tuple[Any, ...]]]]:
    """For each step and each minibatch, each response's prompt, tokens and score, over all ranks."""
    together = Ranks(ranks)
    results: list[list[tuple[Rollout, Scores]]] = [[] for _ in range(ranks)]
    positions: list[list[int]] = [[] for _ in range(ranks)]

    def one(rank: int) -> None:
        world = together.world(rank)
        spec = GrpoSpec.model_validate(
            {"group_size": 4, "rewards": REWARDS, "minibatches": minibatches, "dynamic_sampling": most}
        )
        trainer = SimpleNamespace(position=0, spec=spec)

        def roll_out(
            prompts: Sequence[list[int]], keys: Sequence[tuple[Any, ...]], stop: Any, group_size: int
        ) -> Rollout:
            assert group_size == spec.group_size
            answers = [
                [random.Random(f"{key} {prompt}").randrange(2, 90)] for key, prompt in zip(keys, prompts, strict=True)
            ]
            return Rollout.of(prompts, answers)

        def score(rollout: Rollout, columns: Mapping[str, Sequence[Any]]) -> Scores:
            # A prompt is right with a probability of its own; a third of them are always or never right.
            shares = [min(1.0, max(0.0, (prompt[0] / ROWS - 1 / 6) * 1.5)) for prompt in rollout.prompts]
            right = [float(answer[0] < 90 * share) for answer, share in zip(rollout.responses, shares, strict=True)]
            return Scores(list(right), {"exact": list(right)}, [False] * len(right))

        trainer.roll_out, trainer.score = roll_out, score
        trainer.groups = lambda rollout: torch.arange(len(rollout)) // 4
        stop = SimpleNamespace(cancellable=nullcontext, should_stop=lambda: False)
        context = SimpleNamespace(
            world=world, spec=SimpleNamespace(seed=seed), stop=stop, batch=SimpleNamespace(global_=32)
        )
        rows: Any = [{"prompt_ids": [number]} for number in range(ROWS)]
        sampler = Sampler(context, spec, trainer, rows)  # type: ignore[arg-type]
        for _ in range(step_count):
            results[rank].append(sampler.sample())
            positions[rank].append(trainer.position)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert positions == [positions[0]] * ranks
    steps: list[list[list[tuple[Any, ...]]]] = []
    for step in range(step_count):
        steps.append([])
        for minibatch in range(minibatches):
            share = 32 // ranks
            own = slice(minibatch * share, (minibatch + 1) * share)
            steps[-1].append(
                [
                    (tuple(p), tuple(r), s)
                    for rank in range(ranks)
                    for rollout, scores in [results[rank][step]]
                    for p, r, s in zip(rollout.prompts[own], rollout.responses[own], scores.total[own], strict=True)
                ]
            )
    return [[*steps_of, [(position,)]] for steps_of, position in zip(steps, positions[0], strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_minibatches_are_the_same_on_any_number_of_ranks(ranks: int) -> None:
    assert sampled(ranks, 5, 2, 3, 4) == sampled(1, 5, 2, 3, 4)


def test_dynamic_sampling_uses_each_prompt_with_a_difference_once_and_in_order() -> None:
    """Nothing but the difference decides: of all prompts that were sampled for, exactly those with one are used."""
    begin, rejected = 0, 0
    for step in sampled(2, 12, 1, 11, 100):
        *minibatches, [(end,)] = step
        responses = [response for minibatch in minibatches for response in minibatch]
        groups = [responses[first : first + 4] for first in range(0, 32, 4)]
        assert all(len({score for _, _, score in group}) == 2 for group in groups)
        stream = [outcome(position, 11) for position in range(begin, end)]
        expected = sorted(prompt for prompt, varied in stream if varied)
        assert sorted(group[0][0][0] for group in groups) == expected
        rejected += len(stream) - len(expected)
        begin = end
    assert rejected > 20


def outcome(position: int, seed: int) -> tuple[int, bool]:
    """A position's prompt, and whether its responses differ in their scores."""
    prompt = sample_at(position, ROWS, seed, "grpo")
    share = min(1.0, max(0.0, (prompt / ROWS - 1 / 6) * 1.5))
    keys = [(seed, "rollout", position, i) for i in range(4)]
    scores = {random.Random(f"{key} {[prompt]}").randrange(2, 90) < 90 * share for key in keys}
    return prompt, len(scores) == 2


def test_what_is_still_missing_stays_without_a_difference() -> None:
    (step,) = sampled(2, 1, 1, 5, 1)
    minibatch, [(end,)] = step
    groups = [minibatch[first : first + 4] for first in range(0, 32, 4)]
    flat = sum(len({score for _, _, score in group}) == 1 for group in groups)
    first = [outcome(position, 5)[1] for position in range(8)]
    more = [outcome(position, 5)[1] for position in range(8, end)]
    assert end == 8 + first.count(False)
    assert flat == more.count(False) > 0
