"""A trial goes on only if it is among the better half of those that have come as far."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rlhf.errors import STOPPED_EARLY, HpcRlhfError
from hpc_rlhf.run.halving import stop_if_worse
from hpc_rlhf.run.layout import RunDir, SweepDir


def search(folder: Path, metric: str | None, others: dict[str, list[tuple[int, int, float]]]) -> RunDir:
    """The run of a new trial, beside others with the steps, all steps and values of their evaluations."""
    sweep = SweepDir(folder)
    sweep.json.write_text(json.dumps({"runs": [*others, "new"], "limit": None, "halving": metric}))
    for name, rows in others.items():
        stage = sweep.run(name).stage("sft")
        stage.path.mkdir(parents=True)
        lines = [
            {"kind": "eval", "step": step, "total_steps": total, "perplexity": value, "accuracy": value}
            for step, total, value in rows
        ]
        stage.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "ev')
    return sweep.run("new")


def stops(run: RunDir, value: float | None, evaluation: int = 2, name: str = "perplexity") -> bool:
    try:
        stop_if_worse(run, "sft", evaluation, 8, 40, {name: value})
    except HpcRlhfError as error:
        return error.exit_code == STOPPED_EARLY
    return False


@pytest.mark.parametrize("count", range(7))
def test_the_better_half_goes_on(tmp_path: Path, count: int) -> None:
    """Of n that are as far, itself included, n / 2 rounded up go on; the first one always does."""
    run = search(tmp_path, "sft.perplexity", {f"t{i}": [(8, 40, float(i))] for i in range(count)})
    goes_on = [better for better in range(count + 1) if not stops(run, better - 0.5)]
    assert goes_on == list(range((count + 2) // 2))


def test_equal_trials_go_on(tmp_path: Path) -> None:
    run = search(tmp_path, "sft.perplexity", {f"t{i}": [(8, 40, 3.0)] for i in range(5)})
    assert not stops(run, 3.0)


def test_higher_may_be_better(tmp_path: Path) -> None:
    run = search(tmp_path, "sft.accuracy", {"one": [(8, 40, 0.5)]})
    assert stops(run, 0.4, name="accuracy")
    assert not stops(run, 0.6, name="accuracy")


def test_only_the_same_steps_compare(tmp_path: Path) -> None:
    others = {"short": [(8, 20, 1.0)], "behind": [(4, 40, 1.0)], "ahead": [(16, 40, 1.0)]}
    run = search(tmp_path, "sft.perplexity", others)
    assert not stops(run, 9.0)


def test_rungs_double(tmp_path: Path) -> None:
    run = search(tmp_path, "sft.perplexity", {"one": [(8, 40, 1.0)]})
    assert [evaluation for evaluation in range(1, 17) if stops(run, 9.0, evaluation)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_trial_without_a_finite_value_stops(tmp_path: Path, value: float | None) -> None:
    assert stops(search(tmp_path, "sft.perplexity", {}), value)


def test_other_runs_go_on(tmp_path: Path) -> None:
    """Those of a search without halving, of another stage, and one that only lies beside a search."""
    better = {"one": [(8, 40, 1.0)]}
    assert not stops(search(tmp_path, None, better), 9.0)
    assert not stops(RunDir(tmp_path / "alone"), 9.0)
    (tmp_path / "sweep.json").write_text('{"runs": ["../new"], "limit": null, "halving": "sft.perplexity"}')
    assert not stops(RunDir(tmp_path / "new"), 9.0)
    (tmp_path / "another").mkdir()
    assert not stops(search(tmp_path / "another", "reward.accuracy", better), 9.0)
