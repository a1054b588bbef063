"""Run directories for the report's tests, as the launcher and the ranks write them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Finished, Ready, Requeued, Saved, Started, Stopping, Submitted, Submitting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.load import dump_spec
from tests.train.stages import tiny_spec

VERSIONS = {"hpc-rlhf": "0.1.0", "commit": "0123456789ab", "torch": "2.13.0", "deepspeed": "0.19.8"}
# What nobody should be able to do to a reader of the report.
HOSTILE = """</script></p><script>alert('x')</script><img src=x onerror="alert(1)">&lt;b&gt; {{ 7 * 7 }}
\u202eabc שלום 😀 \x00\x1b[31m\x08\x7f\x9b"""
_BEGAN = 1_700_000_000.0
_SUMMARIES: dict[str, dict[str, float]] = {
    "sft": {"perplexity_before": 512.3, "perplexity_after": 3.456},
    "reward": {"accuracy": 0.9676},
    "ppo": {"reward_first": -0.5, "reward_first_std": 0.8, "reward_last": 2.25, "kl_first": 0.0, "kl_last": 0.31},
}
_PPO = ("reward", "reward_std", "kl", "entropy", "ratio", "approx_kl", "clipfrac", "value_clipfrac",
        "eos_rate", "answer_tokens", "actor_loss", "critic_loss", "explained_variance", "kl_coef",
        "actor_lr")  # fmt: skip
_NAMES = {"sft": ("loss", "lr", "grad_norm"), "reward": ("loss", "accuracy", "margin", "lr", "grad_norm"), "ppo": _PPO}


def make_reported_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 60, interruptions: int = 0, **texts: str
) -> RunDir:
    """A finished run of SFT, reward model and PPO with a step per second; SFT is interrupted.

    Args:
        texts: ``prompt`` and ``answer`` of a final sample of PPO.
    """
    run, spec = RunDir(path), tiny_spec(path, 1)
    path.mkdir(parents=True)
    run.plan_json.write_text(make_plan(spec).to_json())
    run.job_yaml.write_text(dump_spec(spec))
    clock = [_BEGAN]
    monkeypatch.setattr("hpc_rlhf.run.ledger.time.time", lambda: clock[0])
    for number, stage in enumerate(_SUMMARIES, 7):
        _write_stage(run, stage, number, clock, steps, interruptions if stage == "sft" else 0)
    row = {"prompt": "\n\nHuman: What is a bee?\n\nAssistant:", "answer": " An insect.", **texts}
    add_line(
        run.stage("ppo").samples, step=steps, kind="final", sft_answer=" A bee.", sft_reward=0.5, reward=1.5, **row
    )
    monkeypatch.undo()
    return run


def add_line(path: Path, **facts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts, ensure_ascii=False) + "\n")


def finish(run: RunDir, stage: str, steps: int, metrics: dict[str, Any]) -> None:
    folder = run.stage(stage).model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text("w")
    manifest.write(folder, {"step": steps, "seconds": float(steps), "stage": stage, "metrics": metrics})


def evaluate(run: RunDir, prompt: str, answers: dict[str, str]) -> None:
    """Write the report and the responses of an evaluation."""
    between = {"value": 0.7, "low": 0.6, "high": 0.79}
    report = {
        "base": "sft",
        "prompts": 100,
        "confidence": 0.95,
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
        "reward_accuracy": {**between, "pairs": 80},
        "models": {"sft": {"perplexity": 3.5}, "ppo": {"perplexity": 3.9, "win_rate": between}},
    }
    folder = run.stage("eval").model
    folder.mkdir(parents=True)
    run.stage("eval").report.write_text(json.dumps(report))
    add_line(run.stage("eval").answers, prompt=prompt, answers=answers, rewards=dict.fromkeys(answers, 1.0))


def _write_stage(run: RunDir, stage: str, job: int, clock: list[float], steps: int, interruptions: int) -> None:
    ledger, files = Ledger(run.ledger), run.stage(stage)
    files.path.mkdir(parents=True)
    rows: list[str] = []
    ledger.append(Submitting(stage, token=f"t{job}", by="person"))
    ledger.append(Submitted(stage, token=f"t{job}", job_id=str(job)))
    share = -(-steps // (interruptions + 1))
    for attempt in range(interruptions + 1):
        name = f"{job}-{attempt}"
        clock[0] += 30
        ledger.append(Started(stage, attempt=name, job_id=str(job), restart=attempt, ranks=2,
                      host=f"node{attempt}", age=4.0, versions=VERSIONS))  # fmt: skip
        clock[0] += 10
        ledger.append(Ready(stage, attempt=name, step=len(rows)))
        for step in range(len(rows) + 1, min(steps, len(rows) + share) + 1):
            clock[0] += 1
            rows.append(json.dumps(_row(stage, step, steps, clock[0])))
        done = len(rows)
        if attempt == interruptions:
            ledger.append(Finished(stage, attempt=name, step=done, seconds=float(done)))
            break
        ledger.append(Stopping(stage, attempt=name, step=done, reason="preempted", dropped=0.5))
        clock[0] += 2
        ledger.append(Saved(stage, attempt=name, step=done, seconds=2.0, stall=2.0))
        ledger.append(Requeued(stage, attempt=name, step=done, reason="preempted"))
    files.metrics.write_text("\n".join(rows) + "\n")
    finish(run, stage, steps, _SUMMARIES[stage])


def _row(stage: str, step: int, steps: int, time: float) -> dict[str, Any]:
    values = {name: 1 / (step + at) + 0.3 + 0.1 * math.sin(step * (at + 1)) for at, name in enumerate(_NAMES[stage])}
    return {"step": step, "total_steps": steps, "time": time, "kind": "train", **values}
