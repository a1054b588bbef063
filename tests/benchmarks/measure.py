"""Measures the step times and memory of a side in its own process."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path


def _peak_mib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _of_children() -> tuple[float, float]:
    """CPU seconds of the processes that this one has started, and the sum of their peaks of resident memory, MiB."""
    import psutil

    cpu = mib = 0.0
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        cpu += times.user + times.system
        status = Path(f"/proc/{child.pid}/status").read_text()
        mib += int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return cpu, mib


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, threads: {torch.get_num_threads()}"


@dataclass
class Result:
    """One run of one side.

    Attributes:
        seconds: of each step after the warm-up.
        samples, tokens: totals of those steps; tokens exclude padding.
        cpu: CPU seconds of the process in them, a better measure on a busy machine.
        dtype: of the weights that train or generate.
        facts: values that show that the sides did the same, such as the last loss.
        peak_mib: peak resident memory of the process, imports included, from its start to the end of the
            last step; or of the GPU's tensors where there is one.
    """

    seconds: list[float]
    samples: int
    tokens: int
    cpu: float
    dtype: str
    facts: dict[str, float | None]
    peak_mib: float
    device: str = field(default_factory=_device)


class Clock:
    """Records wall-clock time, CPU time and peak memory at the end of each step.

    Args:
        children: count the CPU time and memory of this process's children as well.
    """

    def __init__(self, children: bool = False) -> None:
        self.children = children
        self.ends: list[float] = []
        self.worked: list[float] = []
        self.peak_mib = 0.0

    def step(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        cpu, mib = _of_children() if self.children else (0.0, 0.0)
        self.worked.append(time.process_time() + cpu)
        self.peak_mib = _peak_mib() + mib

    def result(self, warm_up: int, samples: int, tokens: int, dtype: object, **facts: float | None) -> Result:
        """The result of the timed steps.

        Args:
            warm_up: steps to skip, at least one.
            samples, tokens: of the steps timed.
            dtype: torch's, or its name.
        """
        ends = self.ends[warm_up - 1 :]
        seconds = [after - before for before, after in pairwise(ends)]
        cpu = self.worked[-1] - self.worked[warm_up - 1]
        return Result(seconds, samples, tokens, cpu, str(dtype).removeprefix("torch."), facts, self.peak_mib)


def main(sides: Mapping[str, Callable[[argparse.Namespace], Result]]) -> None:
    """Run one side as ``python -m tests.benchmarks.<file> <task> --work …`` and write its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=sorted(sides))
    parser.add_argument("--work", type=Path, required=True, help="folder of the workload")
    parser.add_argument("--run", type=Path, required=True, help="folder of this run's own files")
    parser.add_argument("--samples", type=int, required=True, help="of an optimizer step")
    parser.add_argument("--steps", type=int, required=True, help="with those that warm up")
    parser.add_argument("--warm-up", type=int, required=True, help="steps that are not counted")
    options = parser.parse_args()
    options.ranks = int(os.environ.get("WORLD_SIZE", "1"))
    result = sides[options.task](options)
    if os.environ.get("RANK", "0") == "0":
        (options.run / "result.json").write_text(json.dumps(asdict(result)))
