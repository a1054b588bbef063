"""What a stage's models hold on each GPU."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.architecture import architecture
from hpc_rlhf.launch.memory import run_memory, stage_memory
from hpc_rlhf.spec.gpus import gpu_bytes
from tests.launch.specs import make_spec

COUNT = architecture("facebook/opt-125m", "models.actor").parameters


def sft(**fields: Any) -> dict[str, int]:
    return stage_memory(make_spec("/scratch/demo", sft=fields), "sft").parts


def test_each_zero_stage_shares_out_one_part_more() -> None:
    none, first, second, third = (sft(zero=zero) for zero in range(4))
    assert none == {"weights": 2 * COUNT, "gradients": 2 * COUNT, "optimizer": 12 * COUNT}
    assert first["optimizer"] == second["optimizer"] == third["optimizer"] == 6 * COUNT
    assert first["gradients"] == 4 * (COUNT + 200_000_000)
    assert second["gradients"] == COUNT + 2 * 200_000_000
    assert third["weights"] == COUNT + 60_000_000
    assert third["gradients"] == COUNT + 2 * 500_000_000


def test_precision_offload_and_1_bit_adam_change_the_optimizers_part() -> None:
    assert sft(precision="fp32")["optimizer"] == 8 * COUNT
    assert sft(optimizer="onebit-adam")["optimizer"] == 16 * COUNT
    assert "optimizer" not in sft(zero=2, offload_optimizer=True)


def test_adapters_alone_have_gradients_and_optimizer() -> None:
    parts = sft(lora={"rank": 8})
    adapters = parts["weights"] // 2 - COUNT
    assert 0 < adapters < COUNT / 20
    assert (parts["gradients"], parts["optimizer"]) == (2 * adapters, 12 * adapters)


def test_ppo_holds_four_models_and_gathers_a_sharded_actor() -> None:
    spec = make_spec("/scratch/demo", reward={}, ppo={"zero": 3, "ema": True})
    memory = stage_memory(spec, "ppo")
    assert set(memory.parts) == {
        "weights", "gradients", "optimizer", "ref", "reward", "critic", "EMA", "gathered actor", "KV cache",
    }  # fmt: skip
    assert memory.parts["gathered actor"] == 2 * COUNT
    assert memory.parts["EMA"] == 2 * COUNT


def test_models_that_are_too_large_for_the_gpu_leave_less_than_nothing() -> None:
    spec = make_spec("/scratch/demo", {"gpu": "1G"}, sft={})
    memory = stage_memory(spec, "sft")
    assert memory.left == 2**30 - 16 * COUNT
    assert memory.left < 0


def test_an_unknown_model_leaves_the_other_stages_planned() -> None:
    spec = make_spec("/scratch/demo", sft={}, reward={})
    models = spec.models.model_copy(update={"reward": "nobody/knows-this"})
    found = run_memory(spec.model_copy(update={"models": models}))
    assert isinstance(found["reward"], HpcRlhfError)
    assert not isinstance(found["sft"], HpcRlhfError)


def test_gpus_are_known_by_name_or_by_their_memory() -> None:
    assert gpu_bytes("80G") == 80 * 2**30
    assert gpu_bytes("a100-80g") < gpu_bytes("80G")
    with pytest.raises(ValueError, match="did you mean a100-80g"):
        gpu_bytes("A100-80gb")
