"""Measures a weight sync from two ranks with ZeRO-3 to vLLM: its time, and what each rank holds beyond its shards."""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.rollout import RolloutSpec, interpreter
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models.engine import frozen_engine
from hpc_rlhf.train.models.loading import load_causal, sharded_loading
from hpc_rlhf.train.models.lora import adapt
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine
from hpc_rlhf.train.runtime.world import join, leave
from tests.benchmarks.allocations import Allocations
from tests.train.ranks import start, wait

RANKS = 2
LONGEST = 64  # tokens that vLLM prepares for


def measure(folder: Path, *options: str) -> list[dict[str, Any]]:
    """What each rank measures: the ``seconds`` of syncs after the first, and the bytes of ``tensors`` and of resident
    memory (``rss``) that the first adds at its peak, with the memory shared with the server.

    Args:
        folder: has the model, in ``model``.
        options: of ``rank``.
    """
    logs = [folder / f"{rank}.log" for rank in range(RANKS)]
    wait(start(["-m", "tests.benchmarks.weight_sync", "--folder", str(folder), *options], logs), logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def rank() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--python", default=interpreter(RolloutSpec(engine="vllm")))
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--lora", type=int, default=0, help="rank of the adapters; 0 for none")
    parser.add_argument("--syncs", type=int, default=0, help="syncs to time")
    options = parser.parse_args()
    world = join(RANKS)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    with sharded_loading(config):
        model = load_causal(str(options.folder / "model"), torch.bfloat16)
    if options.lora:
        adapt(model, LoraSpec(rank=options.lora), 1)
    frozen_engine(model, config, world.device)
    spec = RolloutSpec(engine="vllm", python=options.python, tensor_parallel=options.tensor_parallel)
    with Allocations() as meter:
        for each in gc.get_objects():
            if isinstance(each, torch.Tensor):
                each.detach()  # which makes the meter count it
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory counts from here
        tensors, rss = meter.live, _memory("VmRSS")
        backend = VllmEngine(model, world, spec, options.folder, LONGEST, "attempt", "the weight sync", SlurmSpec())
        backend.sync_weights(model)
    seen = {"tensors": meter.peak - tensors, "rss": _memory("VmHWM") - rss, "seconds": []}
    for _ in range(options.syncs):
        start = time.perf_counter()
        backend.sync_weights(model)
        seen["seconds"].append(time.perf_counter() - start)
    backend.close()
    (options.folder / f"{world.rank}.json").write_text(json.dumps(seen))
    leave()


def _memory(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="weight-sync-") as folder:
        AutoModelForCausalLM.from_config(AutoConfig.for_model("opt")).save_pretrained(f"{folder}/model")
        for tensor_parallel in (1, 2):
            measured = measure(Path(folder), "--syncs", "5", "--tensor-parallel", str(tensor_parallel))
            for number, seen in enumerate(measured):
                print(
                    f"OPT-125M, tensor_parallel {tensor_parallel}, rank {number}: {median(seen['seconds']):.2f} s, "
                    f"tensors {seen['tensors'] / 1e6:,.0f} MB, resident memory {seen['rss'] / 1e6:,.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    rank() if "RANK" in os.environ else main()
