"""The choice of ``zero: auto`` and ``micro_batch: auto`` against a measurement of every combination, on this
machine's CPU.

What a rank computes, reads and sends in a second is measured first and stands in the table of GPUs for a while, so that
the choice is made by the same estimates as for any GPU. Then every combination trains a few steps on two ranks with a
thread each, and the fastest of those that the estimate of memory lets in is looked for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from hpc_rlhf.estimate.model_time import DECODE_SHARE, MFU
from hpc_rlhf.estimate.stage_memory import RESERVE
from hpc_rlhf.launch.auto import Choice, choose, describe
from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec import gpus
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from tests.benchmarks.plan_peaks import Case, longest_rows
from tests.train.ranks import rank_environment
from tests.train.stages import make_run

RANKS = 2
# The choice may be this much slower than the fastest combination.
SLOWER = 0.10
NAME = "this-cpu"
SIZES: tuple[tuple[str, int, int, int, int], ...] = (("llama", 4, 256, 2048, 64), ("opt", 2, 512, 8192, 64))
GLOBAL = 16
STEPS, WARM_UP = 7, 2


def case(size: tuple[str, int, int, int, int], fields: dict[str, Any]) -> Case:
    kind, layers, width, vocabulary, longest = size
    common = {"precision": "fp32", "global_batch": GLOBAL, "max_steps": STEPS}
    return Case("sft", kind, layers, width, vocabulary, longest, RANKS, {**common, **fields})


def on_ranks(*args: str) -> list[Any]:
    """The output of this module's rank side on each rank."""
    command = [sys.executable, "-m", "tests.benchmarks.auto_search", "--rank", *args]
    ranks = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for env in rank_environment(RANKS, free_port())
    ]
    outputs = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(outputs[0][1][-3000:])
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def _speeds() -> dict[str, float]:
    """This rank's FLOP/s and bytes per second of memory and messages, measured on both ranks at once."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    left, right = torch.randn(1024, 256), torch.randn(256, 1024)
    large, other = torch.randn(2**24), torch.randn(2**24)
    sent = torch.randn(2**22)

    def rate(work: Callable[[], object], amount: float) -> float:
        seconds = []
        for _ in range(12):
            dist.barrier()
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return amount / statistics.median(seconds[2:])

    return {
        "flops": rate(lambda: left @ right, 2 * left.numel() * right.shape[1]),
        "memory": rate(lambda: large.add_(other), 3 * 4 * large.numel()),
        # An all-reduce sends each number to the other rank and receives the other half of the sum.
        "link": rate(lambda: dist.all_reduce(sent), 4 * sent.numel()),
    }


def _train(path: str) -> float:
    """Median seconds of a step of this run's SFT."""
    from hpc_rlhf.train import context
    from hpc_rlhf.train.entry import run_stage
    from hpc_rlhf.train.metrics import MetricsLog

    ends: list[float] = []

    class Ticking(MetricsLog):
        def log(self, step: int, total_steps: int, kind: str, values: Any) -> None:
            super().log(step, total_steps, kind, values)
            if kind == "train":
                ends.append(time.perf_counter())

    context.MetricsLog = Ticking  # type: ignore[misc]
    longest_rows(read_spec(RunDir(Path(path)).job_yaml).data.max_prompt_tokens)
    run_stage(path, "sft")
    return statistics.median(after - before for before, after in pairwise(ends[WARM_UP - 1 :]))


def measured(size: tuple[str, int, int, int, int], fields: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory(prefix="hpc-rlhf-auto-") as folder:
        run = make_run(case(size, fields).spec(Path(folder)))
        return max(on_ranks("train", str(run.path)))


def chosen(spec: JobSpec, gib: float, speeds: list[dict[str, float]]) -> Choice:
    """The choice for this machine's ranks if each were a GPU with this much memory."""
    slow = {name: min(one[name] for one in speeds) for name in speeds[0]}
    flops, memory, link = slow["flops"] / MFU / 1e12, slow["memory"] / DECODE_SHARE / 1e9, slow["link"] / 1e9
    gpus.GPUS[NAME] = gpus.Gpu(gib, flops, flops, memory, link)
    slurm = spec.stage("sft").slurm.model_copy(update={"gpus_per_node": RANKS, "gpu": NAME})
    return choose(spec.with_stages(sft={"slurm": slurm}), "sft", {"zero": None, "micro_batch": None})


def search(size: tuple[str, int, int, int, int], speeds: list[dict[str, float]]) -> bool:
    """Print every combination, and whether the choice is as fast as the fastest, at two sizes of memory."""
    with tempfile.TemporaryDirectory() as folder:
        spec = case(size, {"micro_batch": 1}).spec(Path(folder))
        everything = chosen(spec, 1000, speeds)
        half = statistics.median(one.held for one in everything.considered) / (1 - RESERVE)
        choices = {"all fit": everything, "half fit": chosen(spec, half / 2**30, speeds)}
    took = {describe(one.fields): measured(size, dict(one.fields)) for one in everything.considered}
    print(f"\n{size[0]}, {size[1]} layers of {size[2]}: measured and estimated seconds of a step, and MiB")
    for one in everything.considered:
        print(
            f"  {took[describe(one.fields)]:6.3f} {one.seconds:6.3f} {one.held / 2**20:7.1f}  {describe(one.fields)}",
            flush=True,
        )
    good = True
    for name, choice in choices.items():
        fastest = min((one for one in choice.considered if one.fits), key=lambda one: took[describe(one.fields)])
        ratio = took[describe(choice.fields)] / took[describe(fastest.fields)]
        good &= ratio <= 1 + SLOWER
        print(
            f"  {name}: chosen {describe(choice.fields)}; fastest {describe(fastest.fields)}; {ratio:.2f} of its time",
            flush=True,
        )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.auto_search", description=__doc__)
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(_speeds() if args.rank[0] == "speeds" else _train(args.rank[1])))
        sys.stdout.flush()
        os._exit(0)
    speeds = on_ranks("speeds")
    print("a rank: " + ", ".join(f"{name} {value / 1e9:.2f} G/s" for name, value in speeds[0].items()))
    good = [search(size, speeds) for size in SIZES]
    return not all(good)


if __name__ == "__main__":
    sys.exit(main())
