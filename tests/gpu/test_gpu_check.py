"""The GPU check works but for the device: on a CPU, at tiny shapes, every part of it runs and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.rollout.test_vllm_server import interpreter

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.train
def test_all_checks_run_at_a_tiny_scale(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu", "--scale", "tiny", "--out", str(tmp_path / "out")]
    command += ["--vllm", interpreter(tmp_path, "answers")]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    logs = "\n".join(path.read_text()[-2000:] for path in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    results = json.loads((tmp_path / "out/results.json").read_text())
    outcomes = {name: check["outcome"] for name, check in results["checks"].items()}
    assert outcomes == {"tests": outcomes["tests"], "speed": "ok", "chain": "ok", "vllm": "ok"}
    assert outcomes["tests"] in ("ok", "skipped")
    assert results["same_tokens_with_cuda_graphs"]
    assert set(results["rollout"]) == {"ours", "ours without CUDA graphs", "transformers", "vLLM"}
    assert results["rollout"]["ours"]["bandwidth_share"] > 0
    assert "loop" in results["attention"]
    assert set(results["training"]) == {"ours", "DeepSpeed", "transformers"}
    assert all(side["mfu"] > 0 for side in results["training"].values())
    assert "resumed to equal weights" in done.stdout
    assert "MFU" in done.stdout.splitlines()[-1]
