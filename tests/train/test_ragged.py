"""Packed sequences and their plan over ranks and micro-batches: none lost, repeated or over budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rlhf.train import ragged
from hpc_rlhf.train.ragged import Ragged, balance_ranks, pack_micro_batches, plan_step, split_to_count

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12]]
CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def test_rows_are_packed_and_padded_again() -> None:
    batch = Ragged.of(ROWS)
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert batch.lengths == (3, 1, 4)
    assert ragged.positions(batch.lengths, CPU).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    padded, mask = ragged.pad(batch.ids, batch.lengths), ragged.mask(batch.lengths, CPU)
    assert padded.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 11, 12]]
    assert padded[mask].tolist() == batch.ids.tolist()
    assert mask.sum(dim=1).tolist() == [3, 1, 4]


def test_the_tail_is_the_end_of_each_row() -> None:
    batch = Ragged.of(ROWS)
    assert batch.ids[batch.tail([1, 1, 1])].tolist() == [7, 8, 12]
    assert batch.ids[batch.tail([2, 0, 3])].tolist() == [6, 7, 10, 11, 12]


@given(LENGTHS, st.integers(40, 100))
def test_micro_batches_hold_every_sequence_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack_micro_batches(lengths, budget)
    assert sorted(i for rows in bins for i in rows) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in rows) <= budget for rows in bins)
    # First-fit leaves no two micro-batches that would fit into one.
    totals = sorted(sum(lengths[i] for i in rows) for rows in bins)
    assert len(totals) < 2 or totals[0] + totals[1] > budget


def test_a_sequence_over_the_budget_gets_its_own_micro_batch() -> None:
    assert pack_micro_batches([3, 9, 4], budget=7) == [[1], [2, 0]]


@given(LENGTHS, st.integers(1, 8))
def test_splitting_loses_nothing_and_adds_empty_ones_only_if_needed(lengths: list[int], more: int) -> None:
    bins = pack_micro_batches(lengths, 60)
    split = split_to_count(bins, len(bins) + more)
    assert len(split) == len(bins) + more
    assert sorted(i for rows in split for i in rows) == list(range(len(lengths)))
    assert sum(not rows for rows in split) == max(0, len(split) - len(lengths))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=8, max_size=40), st.sampled_from([1, 2, 4, 8]))
def test_every_rank_gets_as_many_micro_batches_and_every_sequence_is_used_once(lengths: list[int], ranks: int) -> None:
    plan = plan_step(lengths, ranks, budget=50)
    assert sorted(i for share in plan for rows in share for i in rows) == list(range(len(lengths)))
    assert len({len(share) for share in plan}) == 1
    assert all(sum(lengths[i] for i in rows) <= 50 for share in plan for rows in share)
    tokens = [sum(lengths[i] for rows in share for i in rows) for share in plan]
    assert max(tokens) - min(tokens) <= max(lengths), "the ranks have about as much to do"
    assert all(any(share) for share in plan), "with as many sequences as ranks, none stays idle"


@pytest.mark.parametrize("ranks", [1, 3])
def test_equal_lengths_are_distributed_in_turn(ranks: int) -> None:
    assert balance_ranks([7] * 6, ranks) == [list(range(rank, 6, ranks)) for rank in range(ranks)]
