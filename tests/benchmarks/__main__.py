"""Runs our side and its peers in turn, each run in its own process, and compares them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.spec.rollout import RolloutSpec, interpreter
from tests.benchmarks.workload import precision

OUT = Path("bench.json")
REPOSITORY = Path(__file__).parents[2]
ROUNDS = {"full": 3, "short": 1}
# TRL 1.12, the last with PPO, beside the newest.
TRL_PPO = Path(sys.prefix) / "trl-ppo"
# A side that takes longer has failed, in seconds.
DEADLINE = 900.0


@dataclass(frozen=True)
class Side:
    """Attributes: module, task: what ``python -m tests.benchmarks.<module> <task>`` runs."""

    name: str
    module: str
    task: str


@dataclass(frozen=True)
class Case:
    """One kind of work, done by our side and then by each peer, in every round.

    Attributes:
        samples: samples per optimizer step, or per rollout on each rank.
        steps: timed steps of a full and of a short run.
        warm_up: steps before those, on every side. Ours warms up longest on a CPU, where it builds matrix kernels for
            every new height.
        shape: the name of the model in ``workload.SHAPES``.
        ranks: processes per side.
    """

    name: str
    sides: tuple[Side, ...]
    samples: int
    steps: dict[str, int]
    warm_up: int
    shape: str = "4 x 256"
    ranks: int = 1


OURS = {task: Side("ours", "ours", task) for task in ("pretrain", "sft", "reward", "ppo", "grpo")}
DSC = {task: Side("DeepSpeed-Chat", "deepspeed_chat", task) for task in ("sft", "reward", "ppo")}
TRL = {task: Side("TRL", "trl_trainers", task) for task in ("sft", "reward", "ppo", "grpo")}
TRL_FP32 = {task: Side("TRL, float32 weights", "trl_trainers", f"{task}-fp32") for task in ("sft", "reward")}
PRETRAIN = (OURS["pretrain"], Side("Trainer, DeepSpeed", "transformers_trainer", "pretrain"))
SFT_8 = (OURS["sft"], DSC["sft"])
SFT_24 = (OURS["sft"], TRL["sft"], TRL_FP32["sft"])
REWARD = (OURS["reward"], DSC["reward"], TRL["reward"], TRL_FP32["reward"])
PPO = (OURS["ppo"], DSC["ppo"], TRL["ppo"])
GRPO = (OURS["grpo"], TRL["grpo"])
ROLLOUT = (
    Side("ours", "rollouts", "ours"),
    Side("HybridEngineRollout", "rollouts", "hybrid-engine"),
    Side("generate", "rollouts", "generate"),
)
VLLM = Side("vLLM", "rollouts", "vllm")
CASES = (
    Case("SFT, 8 samples a step", SFT_8, 8, {"full": 30, "short": 15}, warm_up=30),
    Case("SFT, 24 samples a step", SFT_24, 24, {"full": 15, "short": 8}, warm_up=15),
    Case("Reward model, 8 pairs a step", REWARD, 8, {"full": 20, "short": 10}, warm_up=20),
    Case("PPO, 8 samples a step", PPO, 8, {"full": 12, "short": 5}, warm_up=5),
    Case("GRPO, 32 responses a step", GRPO, 32, {"full": 5, "short": 2}, warm_up=2),
    Case("Rollout, ZeRO-3", ROLLOUT, 8, {"full": 3, "short": 1}, warm_up=2, ranks=2),
    Case("Pretraining, 8 sequences a step", PRETRAIN, 8, {"full": 8, "short": 4}, warm_up=4, shape="OPT-125M"),
    Case("Pretraining, two ranks", PRETRAIN, 8, {"full": 8, "short": 4}, warm_up=4, shape="OPT-125M", ranks=2),
    Case("SFT, 8 samples a step", SFT_8, 8, {"full": 8, "short": 4}, warm_up=4, shape="12 x 768"),
    Case("SFT, 24 samples a step", SFT_24, 24, {"full": 5, "short": 3}, warm_up=3, shape="12 x 768"),
    Case("Reward model, 8 pairs a step", REWARD, 8, {"full": 5, "short": 3}, warm_up=3, shape="12 x 768"),
    Case("PPO, 8 samples a step", PPO, 8, {"full": 4, "short": 2}, warm_up=2, shape="12 x 768"),
    Case("GRPO, 32 responses a step", GRPO, 32, {"full": 3, "short": 2}, warm_up=1, shape="12 x 768"),
    Case("Rollout, 64 prompts", (ROLLOUT[0], VLLM, ROLLOUT[2]), 64, {"full": 2, "short": 1}, 2, "12 x 768"),
)


class SideFailed(Exception):
    """A side failed or ran out of time; the message holds the end of its log."""


def run_side(case: Case, side: Side, work: Path, run: Path, length: str) -> dict[str, Any]:
    """Run one side once and return rank 0's result.

    Raises:
        SideFailed: it gave none.
    """
    run.mkdir(parents=True)
    cores = len(os.sched_getaffinity(0))
    common = {
        **os.environ, "OMP_NUM_THREADS": str(max(1, cores // case.ranks)), "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    if side.name == "TRL" and side.task == "ppo":
        common["PYTHONPATH"] = f"{TRL_PPO}:{os.environ.get('PYTHONPATH', '')}"
    if case.ranks > 1:
        common["WORLD_SIZE"] = str(case.ranks)
    command = [
        sys.executable, "-m", f"tests.benchmarks.{side.module}", side.task, "--work", str(work), "--run", str(run),
        "--samples", str(case.samples), "--steps", str(case.warm_up + case.steps[length]),
        "--warm-up", str(case.warm_up),
    ]  # fmt: skip
    log = run / "log"
    with log.open("w") as file:
        ranks = [
            subprocess.Popen(
                command, env=common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if case.ranks > 1 else {}),
                stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY,
            )
            for rank in range(case.ranks)
        ]  # fmt: skip
        try:
            good = _all_end_well(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if not good:
        raise SideFailed(f"{case.name}: {side.name} failed:\n{log.read_text()[-3000:]}")
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    result["rate"] = result["tokens"] / sum(result["seconds"])
    result["cpu_rate"] = result["tokens"] / result["cpu"]
    return result


def _all_end_well(ranks: list[subprocess.Popen[bytes]]) -> bool:
    """Wait until all have finished, one has failed, or time is up."""
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        codes = [rank.poll() for rank in ranks]
        if any(codes) or None not in codes:
            return not any(codes)
        time.sleep(0.1)
    return False


def measure(case: Case, work: Path, length: str, failures: list[str]) -> list[dict[str, dict[str, Any]]]:
    """The results of each side, round by round. A peer that fails is left out from then on.

    Args:
        failures: failure messages are appended here.

    Raises:
        SideFailed: our side failed.
    """
    rounds: list[dict[str, dict[str, Any]]] = []
    sides = list(case.sides)
    for number in range(ROUNDS[length]):
        made: dict[str, dict[str, Any]] = {}
        for side in tuple(sides):
            run = work / "runs" / f"{side.module}-{side.task}-{case.samples}-{case.ranks}-{number}"
            try:
                result = made[side.name] = run_side(case, side, work, run, length)
            except SideFailed as failure:
                if side is case.sides[0]:
                    raise
                failures.append(str(failure))
                print(failure, flush=True)
                sides.remove(side)
                continue
            print(
                f"{case.name}: {side.name} {result['rate']:,.0f} real tokens/s, {result['peak_mib']:,.0f} MiB, "
                f"{result['dtype']} on {result['device']}",
                flush=True,
            )
        rounds.append(made)
    return rounds


def compared(case: Case, rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line per peer that ran in every round: medians over the rounds, and the median of their ratios."""

    def middle(side: str, key: str) -> float:
        return round(median(made[side][key] for made in rounds), 1)

    def ratio(peer: str, key: str) -> float:
        return round(median(made["ours"][key] / made[peer][key] for made in rounds), 2)

    def used(side: str) -> str:
        return f"{rounds[0][side]['dtype']} on {rounds[0][side]['device']}"

    return [
        {
            "model": case.shape, "name": case.name, "against": side.name,
            "unit": "real tokens/s" + (" a rank" if case.ranks > 1 else ""),
            "ours": middle("ours", "rate"), "peer": middle(side.name, "rate"), "ratio": ratio(side.name, "rate"),
            "ratio_of_cpu_time": ratio(side.name, "cpu_rate"),
            "ours_peak_mib": middle("ours", "peak_mib"), "peer_peak_mib": middle(side.name, "peak_mib"),
            "ours_used": used("ours"), "peer_used": used(side.name), "ranks": case.ranks,
            "steps": len(rounds[0]["ours"]["seconds"]), "warm_up": case.warm_up,
            "rounds": [{name: made[name] for name in ("ours", side.name)} for made in rounds],
        }
        for side in case.sides[1:]
        if all({"ours", side.name} <= made.keys() for made in rounds)
    ]  # fmt: skip


def _workload(work: Path, shape: str) -> Path:
    """The folder with the model of that shape and its tokens, made at the first call."""
    folder = work / shape.replace(" ", "")
    if not folder.exists():
        command = [sys.executable, "-m", "tests.benchmarks.workload", str(folder), shape]
        subprocess.run(command, check=True, cwd=REPOSITORY)
    return folder


def _possible(sides: tuple[Side, ...]) -> tuple[Side, ...]:
    """Without vLLM where it is not installed, and without TRL in float32 where all sides are."""
    python = interpreter(RolloutSpec(engine="vllm"))
    if VLLM in sides and not os.path.exists(python):
        print(f"NO VLLM: there is no {python}; make install-vllm makes it. Its rollouts are left out.", flush=True)
        sides = tuple(side for side in sides if side is not VLLM)
    return sides if precision() == "bf16" else tuple(side for side in sides if side not in TRL_FP32.values())


def show(lines: list[dict[str, Any]]) -> None:
    head = ("model", "real tokens/s", "against", "ours", "peer", "ratio", "ours, peak MiB", "peer, peak MiB")
    rows = [
        (
            line["model"], line["name"], line["against"],
            f"{line['ours']:,.0f}", f"{line['peer']:,.0f}", f"{line['ratio']:.2f}x",
            f"{line['ours_peak_mib']:,.0f}", f"{line['peer_peak_mib']:,.0f}",
        )
        for line in lines
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def main() -> None:
    length = os.environ.get("BENCH") or "full"
    if length not in ROUNDS:
        sys.exit(f"BENCH={length}: it is one of {', '.join(ROUNDS)}")
    gpus = torch.cuda.device_count()
    machine = f"{platform.machine()}, cores: {len(os.sched_getaffinity(0))}, GPUs: {gpus}"
    lines: list[dict[str, Any]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        for case in CASES:
            case = replace(case, ranks=min(case.ranks, gpus or case.ranks), sides=_possible(case.sides))
            try:
                lines += compared(case, measure(case, _workload(work, case.shape), length, failures))
            except SideFailed as failure:
                failures.append(str(failure))
                print(failure, flush=True)
            OUT.write_text(json.dumps({"machine": machine, "length": length, "lines": lines}, indent=1))
    print()
    show(lines)
    print(f"\nMedians of {ROUNDS[length]} rounds on {machine}. Peak memory is rank 0's. Every run is in {OUT}.")
    if failures:
        sys.exit(f"{len(failures)} runs failed; see above.")


if __name__ == "__main__":
    main()
