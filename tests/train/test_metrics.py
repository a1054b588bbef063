"""Metrics: valid JSON for any numbers, and every step once, however often the stage was stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.train.metrics import MetricsLog, keep_until


def rows(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().split("\n") if line]


def log_of(folder: Path, step: int = -1, is_main: bool = True) -> MetricsLog:
    return MetricsLog(folder / "metrics.jsonl", folder / "tensorboard", step, is_main)


def test_a_line_has_step_kind_and_numbers(tmp_path: Path) -> None:
    log_of(tmp_path).log(3, 10, "train", {"loss": 1.25, "lr": 9.65e-6})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row.pop("time") > 1e9
    assert row == {"step": 3, "total_steps": 10, "kind": "train", "loss": 1.25, "lr": 9.65e-6}
    assert list((tmp_path / "tensorboard").iterdir())


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log_of(tmp_path).log(1, 2, "train", {"loss": math.nan, "grad_norm": math.inf, "kl": -math.inf, "lr": 1.0})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["grad_norm"], row["kl"], row["lr"]) == (None, None, None, 1.0)


def test_a_tiny_learning_rate_keeps_its_digits(tmp_path: Path) -> None:
    log_of(tmp_path).log(1, 2, "train", {"lr": 3.0864197e-10, "tokens": 123_456_789.0})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["lr"] == 3.0864197e-10
    assert row["tokens"] == 123_456_789


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = log_of(tmp_path, is_main=False)
    log.log(1, 2, "train", {"loss": 1.0})
    log.sync()
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_stage_has_every_step_once(tmp_path: Path) -> None:
    first = log_of(tmp_path)
    for step in range(1, 8):
        first.log(step, 10, "train", {"loss": float(step)})
    first.sync()
    resumed = log_of(tmp_path, step=4)
    for step in range(5, 11):
        resumed.log(step, 10, "train", {"loss": 100.0 + step})
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 11))
    assert [row["loss"] for row in found] == [1, 2, 3, 4, 105, 106, 107, 108, 109, 110]


def test_a_stage_that_starts_over_keeps_no_earlier_line(tmp_path: Path) -> None:
    log_of(tmp_path).log(0, 10, "eval", {"perplexity": 9.0})
    log_of(tmp_path)
    assert rows(tmp_path / "metrics.jsonl") == []


def test_text_with_line_separators_and_torn_lines(tmp_path: Path) -> None:
    """Samples are truncated the same way, and models may generate any character."""
    path = tmp_path / "samples.jsonl"
    strange = "a\u2028b\u2029c\x85d\x0be\r é"
    kept = {"step": 2, "answer": strange}
    lines = [kept, {"step": 3, "answer": "later"}, {"answer": "no step"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text + '{"step": 1, "answ', encoding="utf-8")
    keep_until(path, 2)
    (line,) = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert json.loads(line) == kept
    keep_until(path, 1)
    assert path.read_text() == ""
    keep_until(tmp_path / "none.jsonl", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def test_measurements_after_the_last_step_are_repeated(tmp_path: Path) -> None:
    """A stage that resumes from the checkpoint of its last step evaluates again; at step 0 it does not."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "kind": "eval"}, {"step": 1, "kind": "train"}, {"step": 2, "kind": "train"}]
    ending = [{"step": 2, "kind": "eval"}, {"step": 2, "kind": "final"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines + ending))
    keep_until(path, 2)
    assert rows(path) == lines
    keep_until(path, 0)
    assert rows(path) == lines[:1]
