"""Batches divide evenly, or the error suggests values that do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.batch import Batch, derive_batch
from hpc_rlhf.spec.stages import SftSpec


def stage(micro: int, ranks: int, total: int | None) -> SftSpec:
    return SftSpec.model_validate({"micro_batch": micro, "global_batch": total, "slurm": {"nodes": ranks}})


def test_global_batch_follows_from_micro_batch() -> None:
    assert derive_batch(stage(4, 3, None), "sft") == Batch(micro=4, accumulation=1, ranks=3, global_=12)
    assert derive_batch(stage(4, 3, 36), "sft") == Batch(micro=4, accumulation=3, ranks=3, global_=36)


def test_tensor_parallel_ranks_share_samples() -> None:
    fields = {"micro_batch": 4, "tensor_parallel": 2, "slurm": {"nodes": 3, "gpus_per_node": 4}}
    spec = SftSpec.model_validate(fields)
    assert derive_batch(spec, "sft") == Batch(micro=4, accumulation=1, ranks=6, global_=24)
    with pytest.raises(ValueError, match=r"not a multiple of 24 \(micro_batch 4 x 6 groups of ranks\)"):
        derive_batch(SftSpec.model_validate({**fields, "global_batch": 30}), "sft")
    with pytest.raises(ValueError, match=r"does not divide the 4 ranks of a node.*: 1 or 2 or 4"):
        derive_batch(SftSpec.model_validate({**fields, "tensor_parallel": 3}), "sft")


def test_ranks_that_share_sequences_share_samples() -> None:
    fields = {"micro_batch": 4, "tensor_parallel": 2, "slurm": {"nodes": 3, "gpus_per_node": 4}}
    spec = SftSpec.model_validate({**fields, "sequence_parallel": 3})  # over the nodes
    assert derive_batch(spec, "sft") == Batch(micro=4, accumulation=1, ranks=2, global_=8)
    with pytest.raises(ValueError, match=r"does not divide its 6 groups of tensor_parallel ranks.*: 1 or 2 or 3 or 6"):
        derive_batch(SftSpec.model_validate({**fields, "sequence_parallel": 4}), "sft")


def test_stages_of_a_pipeline_share_samples_across_nodes() -> None:
    slurm = {"nodes": 3, "gpus_per_node": 4}
    fields = {"micro_batch": 2, "global_batch": 24, "zero": 1, "pipeline_parallel": 6, "slurm": slurm}
    assert derive_batch(SftSpec.model_validate(fields), "sft") == Batch(micro=2, accumulation=6, ranks=2, global_=24)
    with pytest.raises(ValueError, match=r"pipeline_parallel 5 does not divide its 12 ranks; use .*: 1 or 2 or 3 or 4"):
        derive_batch(SftSpec.model_validate({**fields, "pipeline_parallel": 5}), "sft")


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5000))
def test_every_suggested_fix_works(micro: int, ranks: int, total: int) -> None:
    if total % (micro * ranks) == 0:
        batch = derive_batch(stage(micro, ranks, total), "sft")
        assert batch.micro * batch.accumulation * batch.ranks == batch.global_ == total
        return
    with pytest.raises(ValueError, match="is not a multiple of") as caught:
        derive_batch(stage(micro, ranks, total), "sft")
    fixes = re.findall(r"(global_batch|micro_batch): (\d+)", str(caught.value))
    assert fixes
    for field, value in fixes:
        fixed = stage(micro, ranks, int(value)) if field == "global_batch" else stage(int(value), ranks, total)
        derive_batch(fixed, "sft")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, None),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "train_batch_size": 24}, None),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 6}, "per_gpu is 2, and must be 4"),
        ({"train_micro_batch_size_per_gpu": 4}, "accumulation_steps is missing, and must be 3"),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "train_batch_size": 12},
            "train_batch_size is 12, and must be 24",
        ),
    ],
)
def test_a_rendered_deepspeed_config_must_have_the_specs_batch(config: dict[str, int], complaint: str | None) -> None:
    batch = derive_batch(stage(4, 2, 24), "sft")
    if complaint is None:
        batch.check_ds_config(config, "a.json")
        return
    with pytest.raises(HpcRlhfError, match=complaint) as caught:
        batch.check_ds_config(config, "a.json")
    assert caught.value.exit_code == 2
