"""hpc-rlhf next: where the next round starts, what it learns from, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.run import feedback, manifest
from hpc_rlhf.run.feedback import Vote
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec, load_spec
from tests.co_user import NOBODY, as_root
from tests.run.votes import pair, thumbs

PAIRS = [pair(f"pair{n}", "left") for n in range(6)]
THUMBS = [thumbs(f"thumb{n}") for n in range(5)]
TIE = pair("tie", "tie")


def finished(
    folder: Path, votes: list[Vote], win_rates: dict[str, float] | None = None, base: str = "sft", **fields: Any
) -> RunDir:
    """A run whose stages are done, with 1,000 rows of data; without win rates it has no evaluation.

    Args:
        base: the model that the others are compared with.
    """
    stages = fields.pop("stages", {"sft": {"lr": 1e-4}, "reward": {"margins": True, "loss": "last"}, "ppo": {}})
    spec = JobSpec.model_validate({
        "name": folder.name, "run_dir": str(folder), "seed": 5, "slurm": {"gpus_per_node": 2, "nodes": 2},
        "data": {"sources": [{"demo": 1000}], "held_out": 0.1}, "models": {"actor": "facebook/opt-125m"},
        "stages": {**stages, **({} if win_rates is None else {"eval": {}})}, **fields,
    })  # fmt: skip
    run = RunDir(folder)
    folder.mkdir(mode=0o700)
    run.job_yaml.write_text(dump_spec(spec))
    run.plan_json.write_text(make_plan(spec).to_json())
    for stage in spec.stage_names:
        run.stage(stage).model.mkdir(parents=True)
        if stage == "eval":
            rates = {model: {"win_rate": interval(rate)} for model, rate in (win_rates or {}).items()}
            report = {
                "base": base, "prompts": 100, "confidence": 0.95, "reward_accuracy": None,
                "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0}, "models": {base: {}, **rates},
            }  # fmt: skip
            run.stage(stage).report.write_text(json.dumps(report))
        manifest.write(run.stage(stage).model, {"step": 1})
    counts = SourceCounts("demo")
    for number in range(1000):
        counts.add(Outcome.TRAINED, str(number))
    data = run.stage(spec.trained[0]).data / "f00"
    data.mkdir(parents=True)
    manifest.write(data, {"sources": [counts.to_dict()]})
    for vote in votes:
        feedback.append(run.feedback, vote)
    return run


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def next_spec(run: RunDir, *sets: str) -> JobSpec:
    out = run.path.with_name("next.yaml")
    assert main(["next", str(run.path), "-o", str(out)]) == 0
    assert main(["check", str(out)]) == 0
    return load_spec(out, sets)


def test_the_best_model_learns_from_pairs_by_the_stages_that_it_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "first", [*PAIRS, *THUMBS, TIE], {"ppo": 0.7})
    spec = next_spec(run)
    assert (
        "starts from ppo, which is the best in the evaluation: it wins 70% (60–80) against sft"
        in capsys.readouterr().err
    )
    assert spec.models.actor == str(run.stage("ppo").model)
    assert spec.models.reward == str(run.stage("reward").model)
    assert spec.stage_names == ("reward", "ppo", "eval")
    assert spec.stages.reward.loss == "last"
    assert not spec.stages.reward.margins, "votes have none"
    assert spec.shares["reward"] == spec.shares["ppo"]
    old, *new = spec.data.sources
    assert [(each.feedback, each.kind) for each in new] == [(str(run.path), "pairs"), (str(run.path), "thumbs")]
    assert old.demo == 1000
    assert old.weight * 1000 == new[0].weight * len(PAIRS + THUMBS), "as many rows as the votes"
    assert (spec.seed, spec.data.held_out, spec.follows) == (5, 0.1, str(run.path))
    assert (spec.name, spec.run_dir) == ("first-round2", str(tmp_path / "first-round2"))
    assert spec.stages.ppo.slurm.nodes == 2


def test_thumbs_are_learned_by_kto(tmp_path: Path) -> None:
    spec = next_spec(finished(tmp_path / "first", [*THUMBS, PAIRS[0]], {"ppo": 0.7}))
    assert spec.stage_names == ("kto", "eval")
    assert spec.models.reward is None, "it has not learned from the votes"
    assert spec.stages.kto.lr == 2.5e-6, "a fortieth of that of sft"
    weights = spec.stages.kto.desirable_weight, spec.stages.kto.undesirable_weight
    assert weights == (1, 3), "there are 5 thumbs up, and 1 + 6 / 4 pairs"
    assert [(each.kind, each.weight) for each in spec.data.sources] == [(None, 0.006), ("pairs", 4), ("thumbs", 4)]


def test_without_a_stage_that_learns_from_pairs_there_is_dpo(tmp_path: Path) -> None:
    run = finished(tmp_path / "first", [*PAIRS, *THUMBS], stages={"sft": {"micro_batch": 2, "precision": "fp32"}})
    spec = next_spec(run)
    assert spec.stage_names == ("dpo", "eval")
    assert (spec.stages.dpo.micro_batch, spec.stages.dpo.precision) == (2, "fp32")
    assert spec.models.actor == str(run.stage("sft").model)
    assert [each.kind for each in spec.data.sources] == [None, "pairs"], "thumbs give DPO no rows"


def test_a_model_that_loses_is_not_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "first", PAIRS, {"ppo": 0.4})
    assert next_spec(run).models.actor == str(run.stage("sft").model)
    assert (
        "starts from sft, which is better than the others: ppo wins 40% (30–50) against sft" in capsys.readouterr().err
    )


def test_rounds_are_counted_and_their_data_stays(tmp_path: Path) -> None:
    first = finished(tmp_path / "first", PAIRS)
    votes = {"feedback": str(first.path), "kind": "pairs", "weight": 4}
    second = finished(
        tmp_path / "first-round2", THUMBS, follows=str(first.path), stages={"dpo": {"lr": 1e-6}},
        data={"sources": [{"demo": 1000, "weight": 0.01}, votes], "held_out": 0.1},
    )  # fmt: skip
    spec = next_spec(second)
    assert (spec.name, spec.follows, spec.models.actor) == (
        "first-round3", str(second.path), str(second.stage("dpo").model),
    )  # fmt: skip
    assert [(each.feedback, each.weight) for each in spec.data.sources] == [
        (None, 0.005), (str(first.path), 4), (str(second.path), 4),
    ]  # fmt: skip
    assert spec.stages.kto.lr == 2.5e-6, "by the rate of sft in the first round"


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(["next", *map(str, args)]) == 2
    return capsys.readouterr().err


def test_what_has_no_next_round_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nobody has voted on its models" in refused(capsys, finished(tmp_path / "quiet", []).path)
    assert "none of the 1 votes prefers a response" in refused(capsys, finished(tmp_path / "tied", [TIE]).path)
    run = finished(tmp_path / "first", PAIRS)
    out = tmp_path / "there.yaml"
    out.write_text("")
    assert f"{out}: the file already exists" in refused(capsys, run.path, "-o", out)
    (tmp_path / "first-round2").mkdir()
    assert "the folder of the next round exists already" in refused(capsys, run.path)
    (run.stage("ppo").model / manifest.NAME).unlink()
    assert "the next round starts from finished models: ppo is not finished" in refused(capsys, run.path)
    moved = run.path.rename(tmp_path / "moved")
    assert "this run was moved" in refused(capsys, moved)
    assert "does not exist" in refused(capsys, tmp_path / "nowhere")


@as_root
def test_a_run_of_another_user_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "first", PAIRS)
    os.chown(run.path, NOBODY, NOBODY)
    assert "this run belongs to" in refused(capsys, run.path)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ("seed=6", "seed: is 6, but 5 in the run that this one follows"),
        ("data.held_out=0.2", "data.held_out: is 0.2, but 0.1"),
        ("data.max_prompt_tokens=64", "data.max_prompt_tokens: is 64, but 256"),
        ("data.sources.0.system=Hi", "data.sources.0.system: differs in the run that this one follows"),
        ("follows=nowhere", "there is no run directory"),
    ],
)  # fmt: skip
def test_what_would_mix_prompts_of_the_evaluation_with_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str, what: str
) -> None:
    run = finished(tmp_path / "first", PAIRS)
    assert main(["next", str(run.path), "-o", str(tmp_path / "next.yaml")]) == 0
    assert main(["check", str(tmp_path / "next.yaml"), "--set", changed]) == 2
    assert what in capsys.readouterr().out
