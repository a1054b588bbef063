"""Runs ours and the peers in turn, each run in a process of its own, and tells how they compare."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.train.stages import free_port

OUT = Path("bench.json")
ROUNDS = {"full": 3, "short": 1}
# TRL 1.12, the last with a PPO, beside the newest.
TRL_PPO = Path(sys.prefix) / "trl-ppo"
DEADLINE = 1800.0


@dataclass(frozen=True)
class Side:
    """Attributes: module, task: what ``python -m tests.benchmarks.<module> <task>`` runs."""

    name: str
    module: str
    task: str


@dataclass(frozen=True)
class Case:
    """One kind of work, done by our side first and then by each peer, in every round.

    Attributes:
        samples: of an optimizer step, or of a rollout on each rank.
        steps: timed, in a full and a short run.
        warm_up: steps before those: kernels are made anew for every new number of tokens, which takes our side some
            forty steps, and the others few.
        ranks: processes of each side.
    """

    name: str
    sides: tuple[Side, ...]
    samples: int
    steps: dict[str, int]
    warm_up: int = 5
    ranks: int = 1


def _sides(task: str, *peers: str) -> tuple[Side, ...]:
    modules = {"DeepSpeed-Chat": "deepspeed_chat", "TRL": "trl_trainers"}
    return (Side("ours", "ours", task), *[Side(peer, modules[peer], task) for peer in peers])


CASES = (
    Case("SFT, 8 samples a step", _sides("sft", "DeepSpeed-Chat"), 8, {"full": 40, "short": 20}, warm_up=40),
    Case("SFT, 24 samples a step", _sides("sft", "TRL"), 24, {"full": 20, "short": 10}, warm_up=20),
    Case("Reward model, 8 pairs a step", _sides("reward", "DeepSpeed-Chat", "TRL"), 8, {"full": 25, "short": 12}, warm_up=25),
    Case("PPO, 8 samples a step", _sides("ppo", "DeepSpeed-Chat", "TRL"), 8, {"full": 12, "short": 5}),
    Case(
        "Rollout, ZeRO-3, two ranks",
        (
            Side("ours", "rollouts", "ours"),
            Side("HybridEngineRollout", "rollouts", "hybrid-engine"),
            Side("generate", "rollouts", "generate"),
        ),
        8, {"full": 4, "short": 2}, warm_up=2, ranks=2,
    ),
)  # fmt: skip


def run_side(case: Case, side: Side, work: Path, run: Path, length: str) -> dict[str, Any]:
    """One run of one side; gives its result.

    Raises:
        SystemExit: it failed; its log is shown.
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
                stdout=file, stderr=subprocess.STDOUT,
            )
            for rank in range(case.ranks)
        ]  # fmt: skip
        try:
            codes = [rank.wait(DEADLINE) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    if any(codes):
        sys.exit(f"{case.name} of {side.name} failed:\n{log.read_text()[-3000:]}")
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    result["rate"] = result["tokens"] / sum(result["seconds"])
    result["cpu_rate"] = result["tokens"] / result["cpu"]
    return result


def compared(case: Case, rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line for each peer: medians over the rounds, and the median of the rounds' ratios."""

    def middle(side: str, key: str) -> float:
        return round(median(made[side][key] for made in rounds), 1)

    def ratio(peer: str, key: str) -> float:
        return round(median(made["ours"][key] / made[peer][key] for made in rounds), 2)

    return [
        {
            "name": case.name, "against": side.name, "unit": "real tokens/s" + (" a rank" if case.ranks > 1 else ""),
            "ours": middle("ours", "rate"), "peer": middle(side.name, "rate"), "ratio": ratio(side.name, "rate"),
            "ratio_of_cpu_time": ratio(side.name, "cpu_rate"),
            "ours_mib": middle("ours", "peak_mib"), "peer_mib": middle(side.name, "peak_mib"),
            "rounds": [{name: made[name] for name in ("ours", side.name)} for made in rounds],
        }
        for side in case.sides[1:]
    ]  # fmt: skip


def show(lines: list[dict[str, Any]]) -> None:
    head = ("", "against", "ours", "peer", "real tokens/s: ratio", "ours MiB", "peer MiB")
    rows = [
        (
            line["name"], line["against"], f"{line['ours']:,.0f}", f"{line['peer']:,.0f}", f"{line['ratio']:.2f}x",
            f"{line['ours_mib']:,.0f}", f"{line['peer_mib']:,.0f}",
        )
        for line in lines
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def main() -> None:
    length = os.environ.get("BENCH") or "full"
    if length not in ROUNDS:
        sys.exit(f"BENCH={length}: it is one of {', '.join(ROUNDS)}")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        subprocess.run([sys.executable, "-m", "tests.benchmarks.workload", str(work)], check=True)
        for case in CASES:
            rounds = []
            for number in range(ROUNDS[length]):
                made = {}
                for side in case.sides:
                    run = work / "runs" / f"{side.module}-{side.task}-{case.samples}-{number}"
                    made[side.name] = run_side(case, side, work, run, length)
                    print(
                        f"{case.name}: {side.name} {made[side.name]['rate']:,.0f} real tokens/s", flush=True
                    )
                rounds.append(made)
            lines += compared(case, rounds)
            OUT.write_text(
                json.dumps({"machine": platform.processor(), "length": length, "lines": lines}, indent=1)
            )
    print()
    show(lines)
    print(f"\nEvery run is in {OUT}.")


if __name__ == "__main__":
    main()
