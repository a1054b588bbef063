"""Runs each check in a process of its own, then prints one table; details go to files in the output folder."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.spec.rollout import RolloutSpec, interpreter

CHECKOUT = Path(__file__).parents[2]
# Seconds for all checks together.
BUDGET = 460.0
PYTEST = [
    sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/train/rollout",
    "tests/train/models/test_varlen.py",
]  # fmt: skip
# How each figure of a side is shown.
FIGURES = {
    "rate": "{:,.0f} tokens/s", "ms": "{:.2f} ms", "error": "largest error {:.1e}", "mfu": "MFU {:.1%}",
    "bandwidth_share": "{:.0%} of the memory bandwidth while decoding", "sync_seconds": "weight sync {:.2f} s",
    "peak_gib": "{:.1f} GiB",
}  # fmt: skip


def run(command: list[str], log: Path, deadline: float) -> tuple[str, str]:
    """Run a check's command; returns its outcome (``ok``, ``FAILED`` or ``skipped``) and the last line it printed."""
    environment = {**os.environ, "MASTER_PORT": str(free_port()), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, timeout=max(1.0, deadline - time.monotonic()),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return "FAILED", f"no time left after {BUDGET:.0f} s for all checks; see {log.name}"
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"
    if code:
        return "FAILED", f"{last} (exit {code}; see {log.name})"
    return ("skipped" if "skipped" in last and "passed" not in last else "ok"), last


def rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The measured figures as lines of the table."""
    return [
        (f"{phase}, {side}", ", ".join(text.format(numbers[name]) for name, text in FIGURES.items() if name in numbers))
        for phase in ("attention", "rollout", "training")
        for side, numbers in results.get(phase, {}).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--vllm", default=interpreter(RolloutSpec(engine="vllm")), help="vLLM's Python")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUDGET
    common = ["--out", str(out), "--scale", options.scale]
    commands = {
        "tests": PYTEST,
        "speed": [sys.executable, "-m", "tests.gpu.speed", *common],
        "chain": [sys.executable, "-m", "tests.gpu.chain", *common],
        "vllm": [sys.executable, "-m", "tests.gpu.vllm_rollouts", *common, "--python", options.vllm],
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "checks": {}}
    table = [("device", f"{device}, torch {torch.__version__}")]
    for name, command in commands.items():
        started = time.monotonic()
        outcome, detail = run(command, out / f"{name}.log", deadline)
        seconds = round(time.monotonic() - started, 1)
        results["checks"][name] = {"outcome": outcome, "detail": detail, "seconds": seconds}
        table.append((name, f"{outcome} in {seconds:.0f} s: {detail}"))
        figures = out / f"{name}.json"
        for key, value in json.loads(figures.read_text()).items() if figures.exists() else ():
            results[key] = {**results.get(key, {}), **value} if isinstance(value, dict) else value
    if "peak_tflops" in results:
        table.append(("limits", f"{results['peak_tflops']:.3g} TFLOP/s in bf16, {results['bandwidth_tb_s']:.3g} TB/s"))
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print()
    for name, text in table + rows(results):
        print(f"{name:<34}{text}")
    sys.exit(any(check["outcome"] == "FAILED" for check in results["checks"].values()))


if __name__ == "__main__":
    main()
