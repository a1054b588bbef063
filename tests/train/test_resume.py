"""A stage stopped anywhere resumes exactly: in mid-window, between minibatches, in any precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from tests.train import tiny
from tests.train.stages import make_run, metrics, run_stage, tiny_spec, weights_digest
from tests.train.stopping import FILES, run_stopping

pytestmark = pytest.mark.train

WEIGHTS, LEARNING = "weights to be written", "the actor's micro-batches"
# All are stopped within an accumulation window of four micro-batches.
WINDOWS: dict[str, dict[str, Any]] = {
    "zero 1, bf16": {"zero": 1, "precision": "bf16", "dropout": 0.1},
    "zero 2, fp16": {"zero": 2, "precision": "fp16", "lora": {"rank": 4}},
    "zero 3, bf16": {"zero": 3, "precision": "bf16", "lora": {"rank": 4, "only": False}},
    "zero 0, fp16": {"precision": "fp16"},
    "1-bit Adam, bf16": {"optimizer": "onebit-adam", "onebit_warmup": 2, "precision": "bf16"},
}
# Their models have 21 weights each, so a stop at the 30th comes within the moving average.
PPO: dict[str, dict[str, Any]] = {
    "zero 0": {
        "ema": True, "ptx": {"demo": 50}, "kl_target": 1e-3, "kl_horizon": 100, "normalize_scores": True,
        "ppo_epochs": 2, "minibatches": 2, "dropout": 0.1,
    },
    "zero 3": {
        "zero": 3, "precision": "bf16", "lora": {"rank": 4, "only": False}, "ema": True, "minibatches": 2,
        "critic": {"zero": 2}, "stop_kl": 1e-6, "eval_every": 1, "keep_best": "reward",
    },
}  # fmt: skip

GRPO: dict[str, dict[str, Any]] = {
    "GRPO": {
        "ema": True, "ptx": {"demo": 50}, "num_iterations": 2, "minibatches": 2, "dropout": 0.1, "group_size": 2,
        "dynamic_sampling": 2, "overlong": "penalty",
    },
    "REINFORCE++": {
        "zero": 3, "precision": "bf16", "lora": {"rank": 4}, "ema": True, "minibatches": 2, "advantage": "reinforce++",
        "kl_in": "reward", "stop_kl": 1e-6, "eval_every": 1, "keep_best": "reward",
    },
}  # fmt: skip


def outputs(run: RunDir, stage: str) -> list[dict[str, Any]]:
    """Metrics and samples without their times."""
    lines = metrics(run, stage)
    samples = run.stage(stage).samples
    if samples.exists():
        lines += [json.loads(line) for line in samples.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def same(stopped: RunDir, whole: RunDir, stage: str) -> None:
    assert weights_digest(stopped, stage) == weights_digest(whole, stage)
    assert outputs(stopped, stage) == outputs(whole, stage)
    assert not list(stopped.stage(stage).path.glob("model-*"))


def stops(run: RunDir, stage: str) -> list[tuple[int, int]]:
    return [(e.step, e.part) for e in Ledger(run.ledger).events(stage) if e.name == "stopping"]


def test_a_stop_in_an_accumulation_window_leaves_no_trace(tmp_path: Path) -> None:
    """The gradients of the window are discarded, and all of it is repeated."""
    fields = {"micro_batch": 1, "global_batch": 8, "max_steps": 3, "warmup": 2}
    pairs = {
        name: [
            make_run(tiny_spec(tmp_path / f"{number}-{how}", sft={**fields, **field})) for how in ("whole", "stopped")
        ]
        for number, (name, field) in enumerate(WINDOWS.items())
        if tiny.is_supported(name)
    }
    work = []
    for whole, stopped in pairs.values():
        work += [(whole, "sft", []), (stopped, "sft", [8])]
    run_stopping(work, 2)
    for name, (whole, stopped) in pairs.items():
        assert stops(stopped, "sft") == [(1, 0)], name
        same(stopped, whole, "sft")
    tiny.skip_unless_supported(str(list(WINDOWS)))  # the others have passed


def test_a_stop_between_minibatches_keeps_the_experience(tmp_path: Path) -> None:
    """Stopped between optimizer steps or in one, the rollout is not made again, and nothing drifts; nor does it where
    the stop comes as the rollout is evaluated, and it is made again, or as the models are handed over."""
    base, short = {"micro_batch": 2, "global_batch": 8, "max_steps": 2}, {"max_steps": 2}

    def make(name: str, fields: dict[str, Any]) -> RunDir:
        return make_run(tiny_spec(tmp_path / name, sft=short, reward=short, ppo={**base, **fields}))

    first, *others = [
        make(f"{name.replace(' ', '-')}-{how}", fields) for name, fields in PPO.items() for how in ("whole", "stopped")
    ]
    run_stopping([(first, "sft", []), (first, "reward", [])], 2)
    for run in others:
        for need in ("sft", "reward"):
            shutil.copytree(first.stage(need).path, run.stage(need).path, dirs_exist_ok=True)
    one, one_stopped, three, three_stopped = first, *others
    work = [
        (one, "ppo", []),
        (one_stopped, "ppo", [5, 13, 13, 3, (WEIGHTS, 2), (WEIGHTS, 30), (FILES, 2)]),
        (three, "ppo", []),
        (three_stopped, "ppo", [5, 14, 9, ("evaluation", 2), (WEIGHTS, 30)]),
    ]
    run_stopping(work, 2)
    assert stops(one_stopped, "ppo") == [(0, 0), (0, 1), (0, 3), (0, 3), *[(2, 0)] * 3]
    assert stops(three_stopped, "ppo") == [(0, 0), (0, 2), (0, 4), (1, 0), (2, 0)]
    same(one_stopped, one, "ppo")
    same(three_stopped, three, "ppo")


def test_grpo_stopped_in_a_rollout_and_between_minibatches_resumes_exactly(tmp_path: Path) -> None:
    """Starting from the actor, with rewards that need no model; PPO trains with these as well."""
    base = {"micro_batch": 2, "global_batch": 8, "max_steps": 2}
    one, one_stopped, three, three_stopped = (
        make_run(tiny_spec(tmp_path / f"{name}-{how}", grpo={**base, **fields}))
        for name, fields in GRPO.items()
        for how in ("whole", "stopped")
    )
    # Without a reward model, the critic starts from the actor.
    ppo = make_run(tiny_spec(tmp_path / "PPO", ppo={**base, "max_steps": 1, "rewards": [{"format": ".*e.*"}]}))
    work = [
        (ppo, "ppo", []),
        (one, "grpo", []),
        (one_stopped, "grpo", [3, ("experience", 1), (LEARNING, 6), (LEARNING, 6), (WEIGHTS, 30)]),
        (three, "grpo", []),
        (three_stopped, "grpo", [5, (LEARNING, 3), ("evaluation", 2), (WEIGHTS, 2)]),
    ]
    run_stopping(work, 2)
    same(one_stopped, one, "grpo")
    same(three_stopped, three, "grpo")
    (line,) = (line for line in metrics(ppo, "ppo") if line["kind"] == "train")
    assert line["reward"] == line["reward/format"]
    assert line["critic_grad_norm"] > 0
    for stopped in (one_stopped, three_stopped):
        places = stops(stopped, "grpo")
        assert (0, 0) in places, "in a rollout"
        assert any(part > 1 for _, part in places), "between optimizer steps"
    assert all(line["masked"] == 0 and line["grad_norm"] > 0 for line in metrics(one, "grpo"))
    assert sum(line["resampled"] for line in metrics(one, "grpo")) > 0


def test_grpo_stopped_in_its_single_update_resumes_exactly(tmp_path: Path) -> None:
    """With an experience that the update had begun to complete."""
    fields = {"micro_batch": 1, "global_batch": 8, "group_size": 2, "max_steps": 2}
    whole, stopped = (make_run(tiny_spec(tmp_path / how, grpo=fields)) for how in ("whole", "stopped"))
    run_stopping([(whole, "grpo", []), (stopped, "grpo", [(LEARNING, 2)])], 2)
    same(stopped, whole, "grpo")
    assert stops(stopped, "grpo") == [(0, 1)]
    assert all(line["kl"] is not None and line["ratio"] == 1 for line in metrics(whole, "grpo"))


def test_a_stage_continues_on_another_number_of_ranks_with_the_same_steps(tmp_path: Path) -> None:
    """Two ranks, then one, then two: the losses are those of two throughout, and no sample is seen twice."""
    fields: dict[str, Any] = {
        "micro_batch": 2,
        "global_batch": 16,
        "max_steps": 9,
        "zero": 2,
        "precision": "fp32",
        "lr": 1e-3,
    }
    whole = make_run(tiny_spec(tmp_path / "whole", 2, sft=fields))
    assert run_stage(whole, "sft", 2) == [0] * 2
    for ranks, stop_after in ((2, 3), (1, 6), (2, None)):
        run = make_run(tiny_spec(tmp_path / "moved", ranks, sft=fields))
        codes = run_stage(run, "sft", ranks, stop_after)
        assert codes == [75 if stop_after else 0] * ranks
    began = [event.ranks for event in Ledger(run.ledger).events("sft") if event.name == "started"]
    assert began == [2, 1, 2]
    found, expected = metrics(run, "sft"), metrics(whole, "sft")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        if line["kind"] == "train":
            assert line["tokens"] == other["tokens"]
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
