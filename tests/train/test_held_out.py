"""Evaluations during training leave no trace in it, and the best weights survive every interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import STOPPED_EARLY
from hpc_rlhf.run import manifest
from hpc_rlhf.run.halving import why_stopped
from hpc_rlhf.run.layout import RunDir
from tests.train.stages import log_tail, make_run, metrics, run_stage, tiny_spec, weights_digest
from tests.train.stopping import run_stopping
from tests.train.test_resume import WEIGHTS, same, stops

pytestmark = pytest.mark.train

# Rates so high that the held-out metrics soon get worse.
STAGES: dict[str, dict[str, Any]] = {
    "sft": {
        "lr": 0.2, "answer_only": False, "zero": 3, "precision": "bf16", "lora": {"rank": 4, "only": False},
        "dropout": 0.1, "keep_best": "perplexity",
    },
    "reward": {"lr": 0.1, "zero": 1, "precision": "bf16", "dropout": 0.1, "max_steps": 5, "keep_best": "loss"},
    "dpo": {"lr": 0.2, "dropout": 0.1, "keep_best": "loss"},
    "ppo": {
        "actor_lr": 0.05, "zero": 3, "precision": "bf16", "lora": {"rank": 4, "only": False}, "ema": True,
        "ema_beta": 0.5, "minibatches": 2, "dropout": 0.1, "keep_best": "reward",
    },
}  # fmt: skip
COMMON = {"max_steps": 4, "micro_batch": 4, "global_batch": 8, "schedule": "constant", "eval_every": 1}
# Before, in and after an evaluation, and while the best weights are written.
STOPS: list[Any] = [3, ("evaluation", 3), (WEIGHTS, 10)]


def make(folder: Path, name: str, stage: str, ranks: int = 2, **changes: Any) -> RunDir:
    fields = {**COMMON, **STAGES[stage], **changes}
    needs: dict[str, dict[str, Any]] = {"sft": {}, "reward": {}} if stage == "ppo" else {}
    run = make_run(tiny_spec(folder / f"{stage}-{name}", ranks, **needs, **{stage: fields}))
    for need in needs:  # made before PPO starts
        run.stage(need).model.symlink_to(folder / f"{need}-whole" / "stages" / need / "model")
    return run


def test_trial_that_is_worse_than_others_stops_after_an_evaluation(tmp_path: Path) -> None:
    """Its search's other trial had a better perplexity after as many steps."""
    run = make(tmp_path, "new", "sft", eval_every=2)
    facts = {"runs": ["other", run.path.name], "limit": None, "halving": "sft.perplexity"}
    (tmp_path / "sweep.json").write_text(json.dumps(facts))
    other = RunDir(tmp_path / "other").stage("sft")
    other.path.mkdir(parents=True)
    line = {"step": 2, "total_steps": 4, "kind": "eval", "perplexity": 1.0}
    other.metrics.write_text(json.dumps(line) + "\n")
    assert run_stage(run, "sft", 2) == [STOPPED_EARLY] * 2, log_tail(run, "sft")
    assert [line["step"] for line in metrics(run, "sft") if line["kind"] == "train"] == [1, 2]
    message = why_stopped(run, "sft")
    assert message is not None
    assert message.startswith("1 of 1 other trials had a better sft.perplexity than ")


def test_the_best_weights_are_those_of_a_shorter_run_whatever_interrupts_the_stage(tmp_path: Path) -> None:
    """The shorter run has no evaluations, so they leave no trace in training."""
    never = {"eval_every": None, "keep_best": None}
    whole = {stage: make(tmp_path, "whole", stage) for stage in STAGES}
    stopped = {stage: make(tmp_path, "stopped", stage) for stage in ("sft", "reward")}
    work: list[Any] = [(run, stage, []) for stage, run in whole.items()]
    run_stopping([*work, *((run, stage, STOPS) for stage, run in stopped.items())], 2)
    best_steps, earlier = {}, []
    for stage in STAGES:
        metric = str(STAGES[stage]["keep_best"])
        lines = {line["step"]: line for line in metrics(whole[stage], stage) if line["kind"] == "eval" and line["step"]}
        values = {step: line[metric] for step, line in lines.items()}
        total = max(values)
        assert list(values) == list(range(1, total + 1))
        best = (max if metric == "reward" else min)(values, key=lambda step: values[step])
        assert best == lines[total]["best_step"], (stage, values)
        facts = manifest.require(whole[stage].stage(stage).model, stage)["metrics"]
        assert facts["best_step"] == best
        name = {"sft": "perplexity_after", "ppo": "held_out_reward"}.get(stage, metric)
        assert facts[name] == pytest.approx(lines[best][metric])
        best_steps[stage] = best
        earlier += [stage] * (best < total)
    assert len(earlier) > 1, f"only {earlier} hand on earlier weights than their last"
    short = {stage: make(tmp_path, "short", stage, max_steps=best, **never) for stage, best in best_steps.items()}
    run_stopping([(run, stage, []) for stage, run in short.items()], 2)
    for stage, run in short.items():
        assert weights_digest(whole[stage], stage) == weights_digest(run, stage), stage
    for stage, run in stopped.items():
        assert len(stops(run, stage)) == len(STOPS)
        same(run, whole[stage], stage)
