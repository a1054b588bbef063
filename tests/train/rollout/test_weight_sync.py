"""While weights go from ZeRO-3 shards to vLLM, no rank holds more than two layers beyond its shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.train.models.export import full_bytes
from tests.benchmarks import weight_sync
from tests.train import tiny
from tests.train.rollout.test_vllm_server import interpreter


@pytest.mark.train
@pytest.mark.parametrize("options", [(), ("--lora", "4", "--tensor-parallel", "2")], ids=["two servers", "one, LoRA"])
def test_no_rank_holds_more_than_two_layers_beyond_its_shards(tmp_path: Path, options: tuple[str, ...]) -> None:
    model = tiny.causal("opt", num_hidden_layers=8, ffn_dim=128).bfloat16()
    model.save_pretrained(tmp_path / "model")
    layer = model.model.decoder.layers[0]
    for rank in weight_sync.measure(tmp_path, "--python", interpreter(tmp_path, "answers"), *options):
        assert full_bytes(layer.fc1.parameters()) < rank["tensors"] <= 2 * full_bytes(layer.parameters())
