"""Rollouts of a model sharded by ZeRO-3 give the unsharded model's tokens, gathered or streamed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import tiny
from tests.train.ranks import reports

pytestmark = pytest.mark.train

RANK = """
import json, sys, torch
from hpc_rlhf.train.runtime.world import join
folder, ranks = sys.argv[1], int(sys.argv[2])
world = join(ranks)
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models.engine import frozen_engine
from hpc_rlhf.train.models.loading import load_causal, sharded_loading
from hpc_rlhf.train.models.lora import LoraLinear, adapt
from hpc_rlhf.train.models.export import full_bytes, gathered
from hpc_rlhf.spec.sizes import WEIGHTS_SHARE
from hpc_rlhf.train.rollout.backend import GenerationRequest, RolloutCancelled, Sampling
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine

config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
every = [[11, 12], [5, 6, 7], [9], [8, 7, 6, 5, 4], [3, 4], [44, 3], [12, 13, 14]]
prompts = every[:1] if world.rank == 0 else every[world.rank : 2 * world.rank + 3]
keys = [(world.rank, row) for row in range(len(prompts))]
eos = -1

def answers(engine, **how):
    request = GenerationRequest(prompts, 12, eos, Sampling(temperature=0.7), keys, 2, **how)
    return engine.generate(request).responses

def adapted(model):
    adapt(model, LoraSpec(rank=4), 5)
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, LoraLinear)):
        with gathered([layer.lora_b], to_change=True), torch.no_grad():
            generator = torch.Generator().manual_seed(number)
            values = torch.empty(layer.lora_b.shape).normal_(0, 0.2, generator=generator)
            layer.lora_b.copy_(values)
    return model

plain = load_causal(folder, torch.float32).eval()
total, layer = full_bytes(plain.parameters()), full_bytes(plain.model.layers[0].parameters())
if world.rank == 0:  # its response ends early, while others still need its shards
    eos = answers(RolloutEngine(plain, world))[0][2]
seen = {"plain": answers(RolloutEngine(plain, world))}
with sharded_loading(config):
    model, other = load_causal(folder, torch.float32), load_causal(folder, torch.float32)
frozen_engine(model, config, world.device)
roomy = RolloutEngine(model, world)
seen["gathered"], seen["again"] = answers(roomy), answers(roomy)
for room in (0, 1, 2, 3):
    engine = RolloutEngine(model, world, memory=int((total - 4 * layer + room * layer + 9) / WEIGHTS_SHARE))
    seen[f"room for {room}"] = [len(engine.gathered.streamed), answers(engine)]
seen["left"] = sum(
    weight.numel()
    for one in (model, roomy.gathered.module, engine.gathered.module)
    for weight in one.parameters()
)
calls = iter(range(100))
try:  # one rank must stop, and all do
    answers(engine, should_stop=lambda: world.rank == 1 and next(calls) == 3)
except RolloutCancelled:
    seen["dropped"] = answers(engine)
seen["adapted"] = answers(RolloutEngine(adapted(plain), world))
frozen_engine(adapted(other), config, world.device)
seen["adapted and gathered"] = answers(RolloutEngine(other, world))
seen["adapted in its turn"] = answers(RolloutEngine(other, world, memory=0 if world.size > 2 else 9))
print(json.dumps(seen))
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_rollouts_match_the_whole_model(tmp_path: Path, ranks: int) -> None:
    tiny.causal("llama", num_hidden_layers=4, tie_word_embeddings=False).save_pretrained(tmp_path)
    seen = reports(RANK, [str(tmp_path), str(ranks)], ranks)
    for one in seen:
        assert one["gathered"] == one["plain"]
        assert one["again"] == one["plain"]
        # The room of one layer is for the one in use.
        for room, streamed in enumerate((4, 4, 3, 2)):
            assert one[f"room for {room}"] == [streamed, one["plain"]]
        assert one["left"] == 0, "gathered weights were not given back"
        assert one["dropped"] == one["plain"]
        assert one["adapted"] != one["plain"]
        assert one["adapted and gathered"] == one["adapted"]
        assert one["adapted in its turn"] == one["adapted"]
    assert len(seen[0]["plain"][0]) < len(seen[1]["plain"][0])
