"""The benchmark compares the right figures, and its sides still run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import __main__ as bench

CASE = bench.Case("PPO, 2 samples a step", bench.PPO, 2, {"short": 1}, warm_up=1, shape="1 x 64")


def result(rate: float, peak_mib: float) -> dict[str, Any]:
    used = {"dtype": "bfloat16", "device": "CPU, threads: 1", "seconds": [1.0]}
    return {"rate": rate, "cpu_rate": rate / 2, "peak_mib": peak_mib, **used}


def test_a_line_has_medians_and_the_median_ratio_of_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = [
        {"ours": result(300, 90), "DeepSpeed-Chat": result(100, 100), "TRL": result(50, 100)},
        {"ours": result(200, 95), "DeepSpeed-Chat": result(100, 140)},
        {"ours": result(250, 70), "DeepSpeed-Chat": result(50, 120)},
    ]
    (line,) = bench.compared(CASE, rounds)  # TRL failed after a round
    assert (line["ours"], line["peer"], line["ratio"]) == (250, 100, 3.0)
    assert (line["ours_peak_mib"], line["peer_peak_mib"]) == (90, 120)
    bench.show([line])
    assert "3.00x" in capsys.readouterr().out


def test_a_failing_peer_is_reported_and_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_side(case: bench.Case, side: bench.Side, *_: Any) -> dict[str, Any]:
        if side.name == "TRL":
            raise bench.SideFailed("TRL is not there")
        return result(1, 1)

    monkeypatch.setattr(bench, "run_side", run_side)
    failures: list[str] = []
    rounds = bench.measure(CASE, tmp_path, "full", failures)
    assert failures == ["TRL is not there"]
    assert [list(made) for made in rounds] == [["ours", "DeepSpeed-Chat"]] * bench.ROUNDS["full"]


@pytest.mark.train
def test_sides_do_the_same_work(tmp_path: Path) -> None:
    """One step each of ours and of DeepSpeed-Chat's loops, as ``make bench`` runs them."""
    subprocess.run([sys.executable, "-m", "tests.benchmarks.workload", str(tmp_path), CASE.shape], check=True)
    ours, peer = (bench.run_side(CASE, side, tmp_path, tmp_path / side.module, "short") for side in CASE.sides[:2])
    for name in ("tokens", "samples", "dtype", "device"):
        assert ours[name] == peer[name]
    assert ours["facts"]["answer_tokens"] == peer["facts"]["answer_tokens"] == 128
    for side in (ours, peer):
        assert side["peak_mib"] > 100
        assert len(side["seconds"]) == 1
