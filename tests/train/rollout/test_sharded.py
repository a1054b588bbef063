"""Rollouts of a model sharded by ZeRO-3 over two real ranks: gathered or not, the tokens are the unsharded model's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import tiny
from tests.train.stages import free_port, rank_environment

pytestmark = pytest.mark.train

RANK = """
import json, sys, torch
from hpc_rlhf.train.world import join
world = join(2)
from hpc_rlhf.train.data.tokenized import pad_left
from hpc_rlhf.train.models.engine import frozen_engine, sharded_loading
from hpc_rlhf.train.models.load import load_causal
from hpc_rlhf.train.rollout.engine import RolloutDropped, RolloutEngine, Sampling, decode
from hpc_rlhf.train.rollout.sampling import uniforms

config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
prompts = [[5, 6, 7], [9], [8, 7, 6, 5, 4]] if world.rank else [[11, 12]]
drawn = uniforms([(world.rank, row) for row in range(len(prompts))], 12)
eos, pad, sampling = -1, 0, Sampling(temperature=0.7)

def answers(engine, **how):
    with engine.ready() as model:
        tokens, mask = decode(model, *pad_left(prompts, pad), 12, sampling, drawn, eos, pad, going=engine.going, **how)
    return [row[real].tolist() for row, real in zip(tokens, mask)]

plain = load_causal(sys.argv[1], torch.float32).eval()
if not world.rank:  # its answer ends early, and it takes part in the other's steps from then on
    eos = answers(RolloutEngine(plain, world))[0][2]
seen = {"plain": answers(RolloutEngine(plain, world))}
with sharded_loading(config):
    model = load_causal(sys.argv[1], torch.float32)
engine = frozen_engine(model, config, world.device)
gathered = RolloutEngine(model, world)
seen["gathered"], seen["again"] = answers(gathered), answers(gathered)
seen["left"] = sum(parameter.numel() for parameter in model.parameters())
together = RolloutEngine(model, world, share=-1.0)
seen["together"] = answers(together)
seen["is_together"] = [gathered.together, together.together]
try:  # one rank alone is told to stop, and both do
    calls = iter(range(100))
    answers(together, stopped=lambda: together.stopped(2 if world.rank and next(calls) == 3 else 0))
except RolloutDropped:
    seen["dropped"] = True
print(json.dumps(seen))
"""


def test_sharded_rollouts_are_those_of_the_whole_model(tmp_path: Path) -> None:
    model = tiny.causal("llama")
    model.save_pretrained(tmp_path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for environment in rank_environment(2, free_port())
    ]  # fmt: skip
    try:
        seen = [json.loads(rank.communicate(timeout=240)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for one in seen:
        assert one["gathered"] == one["plain"]
        assert one["again"] == one["plain"]
        assert one["together"] == one["plain"]
        assert one["is_together"] == [False, True]
        assert one["dropped"]
        assert one["left"] == 0, "the gathered weights were not given back"
    assert len(seen[0]["plain"][0]) < len(seen[1]["plain"][0])
