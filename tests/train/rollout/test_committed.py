"""vLLM generates each response once, whatever interrupts the attempt and however many ranks resume it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.checkpoint.store import CheckpointStore
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, Sampling
from hpc_rlhf.train.rollout.committed import CommittedRollouts
from hpc_rlhf.train.runtime.world import World
from tests.train.worlds import on_ranks

PROMPTS = [[place, 9] for place in range(12)]


class Engine:
    """Never gives a response twice."""

    numbers = count(100)

    def __init__(self) -> None:
        self.asked = self.synced = 0
        self.within: Any = nullcontext

    @property
    def version(self) -> str:
        return f"attempt/{self.synced}"

    def sync_weights(self, model: Any, within: Any = nullcontext) -> None:
        self.synced += 1
        self.within = within

    def generate(self, request: GenerationRequest) -> Rollout:
        self.asked += len(request.prompts)
        responses = [[prompt[0], next(self.numbers)] for prompt in request.prompts]
        return Rollout.of(request.prompts, responses, None, [[-0.1, -1 / response[1]] for response in responses])

    def start(self, request: GenerationRequest) -> Callable[[], Rollout]:
        return lambda: self.generate(request)


class Kept:
    """Weights that are kept by the step after which they were."""

    facts: dict[str, Any] | None = None

    def keep(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def in_model(self) -> Any:
        return nullcontext()


def roll_out(
    folder: Path, ranks: int, step: int = 3, temperature: float = 1.0, calls: int = 1
) -> tuple[dict[int, Any], int]:
    """The last call's tokens and log-probabilities by the prompt's first token, and how often the engine was asked."""

    def work(world: World) -> tuple[Any, Any, int]:
        engine = Engine()
        store = CheckpointStore(folder / "checkpoints", "attempt", 2, world)
        store.claim()
        backend = CommittedRollouts(engine, folder / "rollouts", store, world)  # type: ignore[arg-type]
        backend.begin(step, "rollout")
        own: Sequence[list[int]] = PROMPTS[world.rank :: ranks]
        keys = [("seed", prompt[0]) for prompt in own]
        for _ in range(calls):
            backend.sync_weights(None)
            rollout = backend.generate(GenerationRequest(own, 2, 2, Sampling(temperature), keys))
        return rollout.responses, rollout.response_log_probs, engine.asked

    results = on_ranks(ranks, work)
    answers: dict[int, Any] = {}
    for result in results:
        assert not isinstance(result, Exception), result
        answers.update((tokens[0], (tokens, numbers)) for tokens, numbers in zip(result[0], result[1], strict=True))
    return answers, sum(result[2] for result in results)  # type: ignore[index,misc]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_attempt_that_repeats_a_step_gets_its_responses(tmp_path: Path, ranks: int) -> None:
    first, asked = roll_out(tmp_path, 2)
    assert asked == 12
    assert roll_out(tmp_path, ranks) == (first, 0)


@pytest.mark.parametrize("other", [{"step": 4}, {"temperature": 0.5}, {"calls": 2}])
def test_another_request_is_made(tmp_path: Path, other: dict[str, Any]) -> None:
    first, _ = roll_out(tmp_path, 2)
    second, asked = roll_out(tmp_path, 2, **other)
    assert asked == 12
    assert first != second


def test_a_file_that_a_crash_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    first, _ = roll_out(tmp_path, 1)
    (file,) = (tmp_path / "rollouts").iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    second, asked = roll_out(tmp_path, 1)
    assert asked == 12
    assert first != second


def one_step_off(folder: Path, world: World) -> tuple[Engine, CommittedRollouts]:
    engine = Engine()
    store = CheckpointStore(folder / "checkpoints", "attempt", 2, world)
    store.claim()
    return engine, CommittedRollouts(engine, folder / "rollouts", store, world, Kept())  # type: ignore[arg-type]


def test_a_rollout_of_the_next_step_is_committed_before_anything_else_is_generated(
    tmp_path: Path, world: World
) -> None:
    engine, backend = one_step_off(tmp_path, world)
    request = GenerationRequest(PROMPTS, 2, 2, keys=[(row,) for row in range(len(PROMPTS))])
    backend.begin(2, "rollout")
    backend.keep(2)
    backend.start(3, request, learned=False)
    assert engine.synced == 1
    backend.begin(3, "held-out")
    other = backend.generate(GenerationRequest(PROMPTS[:1], 2, 2, keys=[("other",)]))
    assert (engine.asked, engine.synced) == (13, 2)
    backend.begin(3, "rollout")
    rollout = backend.generate(request)
    assert (engine.asked, engine.synced) == (13, 2)
    assert rollout.responses[0] < other.responses[0], "it was generated first"
    backend.keep(2)
    backend.start(3, request, learned=True)  # on disk: another attempt starts it
    assert (engine.asked, engine.synced) == (13, 2)


@pytest.mark.parametrize("step", [None, 1, 3])
def test_weights_of_another_step_than_the_one_before_are_refused(
    tmp_path: Path, world: World, step: int | None
) -> None:
    engine, backend = one_step_off(tmp_path, world)
    request = GenerationRequest(PROMPTS, 2, 2, keys=[(row,) for row in range(len(PROMPTS))])
    if step is not None:
        backend.keep(step)
    backend.begin(3, "rollout")
    with pytest.raises(HpcRlhfError, match=f"step 3 needs the weights after 2 steps, but those after {step} are kept"):
        backend.generate(request)
    assert engine.asked == 0
