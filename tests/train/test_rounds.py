"""A next round is evaluated on the prompts of the first one, against the model that it started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpc_rlhf.run import feedback
from hpc_rlhf.run.feedback import VoteMessage
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.runtime.stop_signals import StopFlag
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.eval.questions import held_out
from tests.run.votes import pair
from tests.train.finished import as_if_trained
from tests.train.stages import make_run, tiny_spec
from tests.train.test_eval import evaluate, report_of

PROMPTS = 6


def round_of(folder: Path, *stages: str, **fields: Any) -> JobSpec:
    raw = tiny_spec(folder, 1, **{stage: {} for stage in stages}).model_dump(mode="json")
    raw["stages"]["eval"] = {"prompts": PROMPTS}
    return JobSpec.model_validate({**raw, **fields})


def finished(spec: JobSpec, world: World) -> RunDir:
    run = make_run(spec)
    as_if_trained(run, spec)
    evaluate(run, spec, world)
    return run


def answers(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.stage("eval").answers.read_text().splitlines()]


def asked(spec: JobSpec, world: World, prompts: int) -> list[str]:
    """The prompts of an evaluation."""
    return held_out(StageContext(spec, "eval", make_run(spec), world, StopFlag(), "look"), prompts).questions


def test_rounds_are_asked_the_same_prompts(world: World, tmp_path: Path) -> None:
    first = round_of(tmp_path / "first", "sft", "reward", "ppo")
    run = finished(first, world)
    for number in range(40):
        messages = [VoteMessage(role="user", content=f"Question {number}?")]
        feedback.append(run.feedback, pair(f"vote{number}", "left", messages=messages))
    votes = {"feedback": str(run.path), "kind": "pairs"}
    second = round_of(
        tmp_path / "second", "dpo", follows=str(run.path), models={"actor": str(run.stage("ppo").model)},
        data={**first.data.model_dump(mode="json"), "sources": [{"demo": 400, "weight": 0.1}, votes]},
    )  # fmt: skip
    after = finished(second, world)
    before, rows = answers(run), answers(after)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in before]
    assert [row["answers"]["start"] for row in rows] == [row["answers"]["ppo"] for row in before]
    assert [row["answers"]["reference"] for row in rows] == [row["answers"]["reference"] for row in before]
    assert list(report_of(after)["models"]) == ["start", "dpo", "reference"]
    feedback.append(run.feedback, pair("late", "left", messages=[VoteMessage(role="user", content="And now?")]))
    third = second.model_copy(update={"follows": str(after.path), "run_dir": str(tmp_path / "third")})
    assert asked(third, world, PROMPTS) == [row["prompt"] for row in before]


def test_votes_are_not_what_an_evaluation_asks(world: World, tmp_path: Path) -> None:
    spec = round_of(tmp_path / "plain", "reward", "ppo")
    run = make_run(spec)
    for number in range(40):
        messages = [VoteMessage(role="user", content=f"Question {number}?")]
        feedback.append(run.feedback, pair(f"vote{number}", "left", messages=messages))
    votes = {"feedback": str(run.path), "kind": "pairs"}
    data = {**spec.data.model_dump(mode="json"), "sources": [{"demo": 400}, votes]}
    voted = round_of(tmp_path / "voted", "reward", "ppo", data=data)
    assert asked(voted, world, 512) == asked(spec, world, 512)
