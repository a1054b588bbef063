"""The order of samples: every epoch is complete, and no two are alike."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest

from hpc_rlhf.train.data.sampler import blended, exchanged, sample_at, shuffled, total_steps

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


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_computed_order_is_a_permutation_of_its_own_for_every_key(count: int) -> None:
    orders = [[shuffled(place, count, 7, "text", turn) for place in range(count)] for turn in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len(set(map(tuple, orders))) == (3 if count > 4 else len(set(map(tuple, orders))))


def test_a_computed_order_has_every_item_everywhere_equally_often() -> None:
    keys, count = 4000, 10
    for place in (0, 9):
        drawn = Counter(shuffled(place, count, key) for key in range(keys))
        assert all(abs(drawn[item] - keys / count) < 5 * (keys / count) ** 0.5 for item in range(count))
    triples = Counter(tuple(shuffled(place, 4, key) for place in range(3)) for key in range(12_000))
    assert len(triples) == 24
    assert max(triples.values()) - min(triples.values()) < 200


def test_a_blend_is_every_source_spread_evenly() -> None:
    draw = random.Random(1)
    for _ in range(200):
        counts = [draw.choice([0, 1, 2, 3, 7, 50, 100]) for _ in range(draw.randint(1, 6))] + [1]
        places = sorted((Fraction(2 * j + 1, 2 * n), s, j) for s, n in enumerate(counts) for j in range(n))
        blend = [blended(position, counts) for position in range(sum(counts))]
        assert blend == [(source, item) for _, source, item in places]
    share = Counter(source for source, _ in (blended(position, [900, 90, 10]) for position in range(100)))
    assert share == {0: 90, 1: 9, 2: 1}
    with pytest.raises(IndexError):
        blended(3, [1, 2])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_exchanges_the_same_samples(ranks: int) -> None:
    minibatches = [list(range(first, first + 8)) for first in range(0, 24, 8)]
    share = 8 // ranks
    parts = [
        exchanged([batch[rank * share : (rank + 1) * share] for batch in minibatches], rank, 1, "step", 5)
        for rank in range(ranks)
    ]
    joined = [[sample for part in parts for sample in part[number]] for number in range(3)]
    assert joined == exchanged(minibatches, 0, 1, "step", 5)
    assert sorted(sample for batch in joined for sample in batch) == list(range(24))
    assert joined != minibatches
    assert joined != exchanged(minibatches, 0, 1, "step", 6)
    for batch in joined:
        assert sorted(sample % 8 for sample in batch) == list(range(8)), "each rank keeps its samples"


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
