"""The table of an evaluation."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.results import Report, describe_result, notes, read_report, table_rows
from hpc_rlhf.observe.terminal.results import evaluation, summary
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir

REPORT: Report = {
    "base": "sft",
    "prompts": 400,
    "confidence": 0.95,
    "sampling": {"temperature": 0.7, "top_p": 0.9, "top_k": 0},
    "reward_accuracy": {"value": 0.912, "low": 0.88, "high": 0.941, "pairs": 300},
    "models": {
        "sft": {
            "perplexity": 3.456, "reward": {"value": 0.5, "low": 0.25, "high": 0.75},
            "answer_tokens": {"value": 120.0, "low": 100.0, "high": 140.0}, "ended": 0.985, "bleu": 12.345,
        },
        "ppo": {
            "perplexity": 4.0, "reward": {"value": 2.5, "low": None, "high": None},
            "win_rate": {"value": 0.875, "low": 0.84, "high": 0.905},
            "answer_tokens": {"value": 130.0, "low": 110.0, "high": 150.0}, "ended": 1.0, "bleu": 11.0,
        },
    },
}  # fmt: skip


def test_models_are_side_by_side_with_intervals() -> None:
    assert table_rows(REPORT) == [
        ("", "sft", "ppo"),
        ("perplexity", "3.46", "4"),
        ("reward", "0.5 ± 0.25", "2.5"),  # of a single prompt, whose interval has no end
        ("wins against sft", "-", "88% (84–90)"),
        ("tokens", "120 ± 20", "130 ± 20"),
        ("ended", "98%", "100%"),
        ("BLEU", "12.3", "11"),
    ]


def test_accuracies_come_first_each_source_by_itself() -> None:
    right = {"value": 0.875, "low": 0.84, "high": 0.905}
    gain = {"value": 0.25, "low": 0.125, "high": 0.375}
    sources = {"{a}": {"accuracy": right}, "b": {"accuracy": right}}
    judged = {"reward/exact": gain, "pass@4": right, "majority@4": right, "accuracy": right}
    sft, ppo = judged, {**judged, "accuracy_gain": gain, "sources": sources}
    report: Report = {**REPORT, "samples": 4, "judged_by": ["exact", "math"], "models": {"sft": sft, "ppo": ppo}}
    assert table_rows(report)[1:] == [
        ("accuracy", "88% (84–90)", "88% (84–90)"),
        ("accuracy: {a}", "-", "88% (84–90)"),
        ("accuracy: b", "-", "88% (84–90)"),
        ("accuracy gain over sft", "-", "0.25 ± 0.12"),
        ("pass@4", "88% (84–90)", "88% (84–90)"),
        ("majority@4", "88% (84–90)", "88% (84–90)"),
        ("reward/exact", "0.25 ± 0.12", "0.25 ± 0.12"),
    ]
    assert "Accuracy by exact and math, of 4 responses to each prompt." in notes(report)
    assert describe_result("eval", {"accuracies": {"sft": 0.25, "grpo": 0.875}}) == "right: sft 25%, grpo 88%"


def test_notes_describe_the_evaluation() -> None:
    text = " ".join(notes(REPORT))
    assert "prefers the chosen response in 91% (88–94) of 300 held-out pairs" in text
    assert "400 held-out prompts, sampled at temperature 0.7, top_p 0.9." in text
    assert len(list(evaluation({**REPORT, "models": {}, "prompts": 0}))) == 1


def test_missing_evaluation_is_reported(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(HpcRlhfError, match="cannot read the evaluation: No such file"):
        read_report(run)
    run.stage("eval").report.parent.mkdir(parents=True)
    run.stage("eval").report.write_text(json.dumps(REPORT))
    assert read_report(run) == REPORT


def test_summary_includes_the_evaluation(tmp_path: Path) -> None:
    run, out = RunDir(tmp_path), StringIO()
    metrics = {"prompts": 400, "base": "sft", "win_rates": {"ppo": 0.875}}
    for stage in ("sft", "eval"):
        run.stage(stage).model.mkdir(parents=True)
        if stage == "eval":
            run.stage(stage).report.write_text(json.dumps(REPORT))
        facts = {"step": 3, "seconds": 8.0, "metrics": metrics if stage == "eval" else {}}
        manifest.write(run.stage(stage).model, facts)
    Console(file=out, width=100).print(*summary(run, 100), soft_wrap=True)
    text = out.getvalue()
    assert "ppo wins 88% against sft" in text
    assert "wins against sft" in text
    assert "stages/sft/model" in text.splitlines()[-1]  # a report is no model
