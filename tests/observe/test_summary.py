"""The summary at the end of a run, and its progress lines."""

from __future__ import annotations

import json
import os
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpc_rlhf.observe.terminal.progress import PlainProgress, StageView
from hpc_rlhf.observe.terminal.results import summary
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Resumed, Started
from hpc_rlhf.run.format import duration, number
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger

METRICS: dict[str, dict[str, float]] = {
    "sft": {"perplexity_before": 512.3, "perplexity_after": 3.456},
    "reward": {"accuracy": 0.9676},
    "ppo": {"reward_first": -0.5, "reward_first_std": 0.8, "reward_last": 2.25, "kl_first": 0, "kl_last": 0.31},
    "dpo": {"accuracy": 0.6},
}


def finish(run: RunDir, stage: str) -> None:
    folder = run.stage(stage).model
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    manifest.write(folder, {"step": 40, "seconds": 75.4, "stage": stage, "metrics": METRICS[stage]})


def add_sample(run: RunDir, **row: Any) -> None:
    with run.stage("ppo").samples.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 40, "kind": "final", "reward": 1.5, "sft_reward": 0.5, **row}) + "\n")


def shown(run: RunDir, width: int = 80) -> str:
    out = StringIO()
    console = Console(file=out, width=width, markup=False)
    for part in summary(run, width):
        console.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))
    return out.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    for stage in ("sft", "reward", "ppo"):
        finish(run, stage)
    for row in range(4):
        prompt = f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Question {row}?\n\nAssistant:"
        add_sample(run, prompt=prompt, answer=f" polite {row}", sft_answer=f" plain {row}")
    return run


def test_every_stage_has_its_result(run: RunDir) -> None:
    text = " ".join(shown(run).split())
    assert "sft 40 1 min 15 s held-out perplexity 512 → 3.46" in text
    assert "reward 40 1 min 15 s held-out accuracy 0.968" in text
    assert "ppo 40 1 min 15 s reward -0.5 → 2.25 (first std 0.8), KL 0 → 0.31" in text


def test_three_prompts_are_shown_with_both_responses(run: RunDir) -> None:
    lines = shown(run, 120).splitlines()
    for row in range(3):
        line = next(line for line in lines if f"Question {row}?" in line)
        assert line.split() == ["Question", f"{row}?", "plain", str(row), "polite", str(row)]
    assert not any("Question 3?" in line for line in lines)


def test_dpo_responses_have_no_reward(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    finish(run, "dpo")
    row = {"step": 40, "kind": "final", "prompt": "Human: Who?", "answer": "polite", "sft_answer": "plain"}
    run.stage("dpo").samples.write_text(json.dumps(row))
    text = shown(run, 120)
    assert "held-out accuracy 0.6" in text
    assert "after DPO" in text
    assert next(line for line in text.splitlines() if "Who?" in line).split() == ["Who?", "plain", "polite"]
    assert "reward" not in text


def test_next_commands_are_shell_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "my run")
    finish(run, "sft")
    text = shown(run)
    assert "hpc-rlhf chat 'my run'\n" in text
    assert "'my run/stages/sft/model'\n" in text


@pytest.mark.parametrize("width", [80, 120])
def test_long_and_odd_responses_fit_the_width(run: RunDir, width: int) -> None:
    run.stage("ppo").samples.unlink()
    odd = "[bold]not markup[/bold] \x07\x1b[2J " + "word " * 300 + "x" * 500
    add_sample(run, prompt="no roles at all", answer=odd, sft_answer="")
    text = shown(run, width)
    assert "[bold]not" in text
    assert "\x1b" not in text
    table = text[: text.index("Next:")]
    assert max(map(len, table.splitlines())) <= width
    assert len(table.splitlines()) < 40


def test_truncated_or_missing_samples_are_tolerated(run: RunDir) -> None:
    run.stage("ppo").samples.write_text('{"kind": "final", "pro')
    assert "held-out accuracy 0.968" in shown(run)
    run.stage("ppo").samples.unlink()
    assert "Next:" in shown(run)


def test_missing_or_non_finite_metrics_are_dashes(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.stage("sft").model.mkdir(parents=True)
    manifest.write(run.stage("sft").model, {"stage": "sft", "metrics": {"perplexity_before": None}})
    assert "held-out perplexity - → -" in shown(run)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (32520, "9 h 2 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"), [(None, "-"), (0.0, "0"), (1234.5, "1,234"), (0.000123, "0.000123"), (-99.96, "-100")]
)
def test_numbers(value: float | None, words: str) -> None:
    assert number(value) == words


def log_step(run: RunDir, step: int, at: float, **values: float | None) -> None:
    line = {"step": step, "total_steps": 20, "time": at, "kind": "train", **values}
    with run.stage("sft").metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_stage_shows_its_phase_and_then_its_progress(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.stage("sft").path.mkdir(parents=True)
    log_step(run, 4, time.time() - 1000, loss=9.0)  # of an earlier attempt
    view = StageView(run, "sft", ranks=2)
    now = view.began

    def words() -> str:
        view._ledger_read = 0
        view.update()
        return view.words()

    assert (words(), view.total) == ("starting 2 ranks", None)
    Ledger(run.ledger).append(Started("sft"))
    assert words() == "loading data and model"
    Ledger(run.ledger).append(Resumed("sft", step=4))
    assert words() == "resuming from step 4"
    log_step(run, 5, now + 1, loss=2.0)
    assert (words(), view.step, view.total) == ("loss 2", 5, 20)
    log_step(run, 10, now + 2, loss=None)
    assert words() == "loss -, 5 steps/s, 2 s left"
    with run.stage("sft").metrics.open("a") as file:
        file.write('{"step": 11')  # being written
    assert words() == "loss -, 5 steps/s, 2 s left"


def test_rewritten_metrics_are_read_from_the_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.stage("sft").path.mkdir(parents=True)
    view = StageView(run, "sft", ranks=1)
    for step in (5, 6, 7):
        log_step(run, step, view.began + step, loss=1.0)
    view.update()
    kept = run.stage("sft").metrics.read_text().splitlines(True)[:1]
    run.stage("sft").metrics.with_suffix(".partial").write_text("".join(kept))
    os.replace(run.stage("sft").metrics.with_suffix(".partial"), run.stage("sft").metrics)
    log_step(run, 6, view.began + 9, loss=3.0)
    view.update()
    assert view.step == 6
    assert view.words().startswith("loss 3")


def test_plain_progress_prints_every_tenth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    run.stage("sft").path.mkdir(parents=True)
    progress = PlainProgress(run)
    progress.started("sft", 2)
    for step in range(1, 21):
        log_step(run, step, time.time() + step, loss=1.0)
        progress.tick()
    progress.finished("sft")
    lines = capsys.readouterr().err.splitlines()
    steps = [line.split()[2].rstrip(",") for line in lines if line.startswith("sft: step")]
    assert steps == [f"{step}/20" for step in range(2, 21, 2)]
    assert lines[0] == "sft: starting 2 ranks"
    assert lines[-1].startswith("sft: finished in ")
