"""The order of samples: every epoch is complete, and no two are alike."""

from __future__ import annotations

import pytest

from hpc_rlhf.train.data.sampler import sample_at, total_steps

COUNT = 13


def stream(length: int, seed: int = 1, purpose: str = "sft") -> list[int]:
    return [sample_at(position, COUNT, seed, purpose) for position in range(length)]


def test_every_epoch_is_a_different_permutation() -> None:
    epochs = [stream(5 * COUNT)[e * COUNT : (e + 1) * COUNT] for e in range(5)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_position_is_a_pure_function_of_seed_and_purpose() -> None:
    whole = stream(60)
    assert [sample_at(p, COUNT, 1, "sft") for p in (59, 3, 40, 3)] == [whole[59], whole[3], whole[40], whole[3]]
    assert whole != stream(60, seed=2)
    assert whole != stream(60, purpose="ptx")


@pytest.mark.parametrize(
    ("count", "epochs", "per_step", "max_steps", "steps"),
    [
        (100, 1, 10, None, 10),
        (109, 1, 10, None, 10),
        (105, 2, 10, None, 21),  # the rest of one epoch starts the next
        (3, 1, 10, None, 1),
        (100, 1, 10, 4, 4),
        (100, 1, 10, 400, 10),
    ],
)
def test_total_steps(count: int, epochs: int, per_step: int, max_steps: int | None, steps: int) -> None:
    assert total_steps(count, epochs, per_step, max_steps) == steps
