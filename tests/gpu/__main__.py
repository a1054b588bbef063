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

CHECKOUT = Path(__file__).parents[2]
# Seconds for all checks together.
BUDGET = 460.0
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/train/rollout"]


def run(name: str, command: list[str], log: Path, deadline: float) -> tuple[str, str]:
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
    return ("ok" if name != "tests" or "passed" in last else "skipped"), last


def rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The measured figures as lines of the table."""
    table = []
    for phase, unit in (("rollout", "tokens/s"), ("training", "tokens/s")):
        for side, figures in results.get(phase, {}).items():
            text = f"{figures['rate']:,.0f} {unit}, {figures['peak_gib']:.1f} GiB"
            if "mfu" in figures:
                text += f", MFU {figures['mfu']:.1%} of {results['peak_tflops']:.0f} TFLOP/s"
            table.append((f"{phase}, {side}", text))
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUDGET
    common = ["--out", str(out), "--scale", options.scale]
    commands = {
        "tests": PYTEST,
        "speed": [sys.executable, "-m", "tests.gpu.speed", *common],
        "chain": [sys.executable, "-m", "tests.gpu.chain", *common],
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "checks": {}}
    table = [("device", f"{device}, torch {torch.__version__}")]
    for name, command in commands.items():
        started = time.monotonic()
        outcome, detail = run(name, command, out / f"{name}.log", deadline)
        seconds = round(time.monotonic() - started, 1)
        results["checks"][name] = {"outcome": outcome, "detail": detail, "seconds": seconds}
        table.append((name, f"{outcome} in {seconds:.0f} s: {detail}"))
        figures = out / f"{name}.json"
        if figures.exists():
            results |= json.loads(figures.read_text())
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print()
    for name, text in table + rows(results):
        print(f"{name:<34}{text}")
    sys.exit(any(check["outcome"] == "FAILED" for check in results["checks"].values()))


if __name__ == "__main__":
    main()
