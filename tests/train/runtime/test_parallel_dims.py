"""Ranks laid out over the dimensions of parallelism."""

from __future__ import annotations

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.runtime.world import ParallelDims


def test_neighbouring_ranks_share_layers_and_samples() -> None:
    dims = ParallelDims.of(6, tensor=2)
    assert (dims.size, dims.data) == (6, 3)
    assert [dims.coordinate("tensor", rank) for rank in range(6)] == [0, 1, 0, 1, 0, 1]
    assert [dims.coordinate("data", rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert dims.group("tensor", 3) == [2, 3]
    assert dims.group("data", 3) == [1, 3, 5]
    assert dims.sample_owners == [0, 2, 4]


def test_ranks_that_share_rows_hold_copies_of_a_model() -> None:
    dims = ParallelDims.of(8, tensor=2, sequence=2)
    assert (dims.data, dims.replicas) == (2, 4)
    assert dims.group("tensor", 6) == [6, 7]
    assert dims.group("sequence", 5) == [5, 7]
    assert dims.sharers(6) == [4, 5, 6, 7]
    assert dims.sample_owners == [0, 4]


def test_without_tensor_parallelism_each_rank_has_samples_of_its_own() -> None:
    dims = ParallelDims.of(3)
    assert dims.sample_owners == dims.group("data", 1) == [0, 1, 2]
    assert dims.group("tensor", 1) == [1]


def test_stages_of_a_pipeline_work_on_the_same_samples_and_the_last_one_counts_them() -> None:
    dims = ParallelDims.of(12, tensor=2, pipeline=3)
    assert (dims.size, dims.data) == (12, 2)
    assert dims.group("pipeline", 3) == [1, 3, 5]
    assert dims.group("tensor", 3) == [2, 3]
    assert dims.group("data", 3) == [3, 9]
    assert dims.sample_owners == [4, 10]


def test_ranks_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(HpcRlhfError, match="3 ranks cannot be divided into groups of 2"):
        ParallelDims.of(3, tensor=2)
    with pytest.raises(HpcRlhfError, match="6 ranks cannot be divided into groups of 4"):
        ParallelDims.of(6, tensor=2, sequence=2)
