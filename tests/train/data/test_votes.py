"""Votes as a source: comparisons become pairs, and what gives none is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hpc_rlhf.cli import main
from hpc_rlhf.estimate.sample_counts import expected_samples
from hpc_rlhf.run import feedback
from hpc_rlhf.run.feedback import VoteMessage
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import Data
from hpc_rlhf.train.data.sources import read, stage_samples, unfit_for
from tests.run.votes import pair, thumbs
from tests.train.data.specs import spec_of

TURNS = [
    VoteMessage(role="system", content="Be brief."), VoteMessage(role="user", content="Hi"),
    VoteMessage(role="assistant", content="Hello."), VoteMessage(role="user", content="What colour is snow?"),
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with two preferences of ten votes, and a torn line."""
    run = RunDir(tmp_path / "served")
    run.path.mkdir()
    run.job_yaml.write_text("")
    votes = [
        pair("left", "left", messages=TURNS), pair("right", "right", messages=TURNS),
        thumbs("up"), thumbs("down", "down"),
        pair("tie", "tie"), pair("bad1", "both_bad"), pair("bad2", "both_bad"), pair("changed", "left"),
        pair("changed", "tie"), pair("same", "left", responses=["White.", "White. "]),
        pair("empty", "left", responses=["White.", " "]), pair("nothing", "left", responses=["", "White."]),
    ]  # fmt: skip
    for vote in votes:
        feedback.append(run.feedback, vote)
    with next(run.feedback.glob("*.jsonl")).open("a") as file:
        file.write('{"id": "torn')
    return run


def job(folder: Path, run: RunDir, **fields: object) -> Path:
    source = {"feedback": str(run.path), "kind": "pairs", **fields}
    spec = {
        "name": "next", "run_dir": str(folder / "next"), "models": {"actor": "facebook/opt-125m"},
        "slurm": {"gpus_per_node": 1}, "data": {"sources": [source], "held_out": 0}, "stages": {"dpo": {}},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def test_the_better_response_is_chosen(run: RunDir) -> None:
    counts = SourceCounts("")
    left, right, *_ = read(SourceSpec(feedback=str(run.path), kind="pairs"), 0, counts)
    assert (left.chosen, left.rejected) == (" White.", " Snow is white.")
    assert (right.chosen, right.rejected) == (" Snow is white.", " White.")
    assert left.turns == (
        ("system", "Be brief."), ("human", "Hi"), ("assistant", "Hello."), ("human", "What colour is snow?"),
    )  # fmt: skip
    assert left.where.endswith("votes-000001.jsonl:1")
    assert counts.ignored == {}


def test_every_vote_is_counted(run: RunDir, tmp_path: Path) -> None:
    spec = load_spec(job(tmp_path, run))
    counts = [SourceCounts("votes")]
    samples = list(stage_samples(spec, "dpo", counts))
    assert [each.sample.where[-2:] for each in samples] == [":1", ":2"]
    assert {outcome: count.rows for outcome, count in counts[0].outcomes.items()} == {
        Outcome.THUMBS: 2, Outcome.TIE: 2, Outcome.BOTH_BAD: 2, Outcome.SAME_ANSWERS: 1, Outcome.NO_REJECTED: 1,
        Outcome.NO_ANSWER: 1, Outcome.DAMAGED: 1,
    }  # fmt: skip
    assert expected_samples(spec, "dpo") == 5, "by the votes alone"


def test_thumbs_are_labels_for_kto_and_responses_for_sft(run: RunDir, tmp_path: Path) -> None:
    path = job(tmp_path, run, kind="thumbs")
    path.write_text(path.read_text().replace("dpo: {}", "kto: {}"))
    spec, counts = load_spec(path), [SourceCounts("votes")]
    up, down = (each.sample for each in stage_samples(spec, "kto", counts))
    assert (up.chosen, up.rejected, up.labeled) == (" White.", "", True)
    assert (down.chosen, down.rejected, down.labeled) == ("", " White.", True)
    assert {outcome: count.rows for outcome, count in counts[0].outcomes.items()} == {
        Outcome.COMPARISON: 9, Outcome.DAMAGED: 1,
    }  # fmt: skip
    assert expected_samples(spec, "kto") == 2
    assert unfit_for(up, Data.PAIRS) is unfit_for(down, Data.PAIRS) is Outcome.ONE_ANSWER, "no row is lost for DPO"
    path.write_text(path.read_text().replace("kto: {}", "sft: {}"))
    assert [each.sample.chosen for each in stage_samples(load_spec(path), "sft")] == [" White."]


def test_check_reads_votes(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = job(tmp_path, run)
    assert main(["check", str(path), "--set", "stages.sft={}"]) == 0, capsys.readouterr().err
    for vote in ("left", "right"):
        feedback.delete(run.feedback, lambda each, vote=vote: each.vote == vote)  # type: ignore[misc]
    assert main(["check", str(path)]) == 2
    assert "none of the rows gives pairs of responses, which dpo needs" in capsys.readouterr().out
    for file in run.feedback.iterdir():
        file.unlink()
    assert main(["check", str(path)]) == 2
    assert "the run has no votes (people vote on the page of hpc-rlhf serve RUN)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"kind": None}, "feedback and kind belong together"),
        ({"kind": "stars"}, "must be 'pairs' or 'thumbs', not"),
        ({"kind": "thumbs"}, "none contains pairs of responses, which the dpo stage trains on"),
        ({"format": "hh"}, "feedback has a format of its own"), ({"path": "some/data"}, "give exactly one of path"),
        ({"columns": {"prompt": "x"}}, "only a source with a path"),
        ({"feedback": "nowhere"}, "there is no run directory"),
    ],
)  # fmt: skip
def test_a_source_of_votes_is_checked(
    run: RunDir, tmp_path: Path, fields: dict[str, object], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(job(tmp_path, run, **fields))]) == 2
    assert what in capsys.readouterr().out


def test_a_stage_has_no_votes_of_its_own(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ptx = json.dumps({"feedback": str(run.path), "kind": "pairs"})
    path = job(tmp_path, run)
    assert (
        main(["check", str(path), "--set", "stages={sft: {}, reward: {}, ppo: {}}", "--set", f"stages.ppo.ptx={ptx}"])
        == 2
    )
    assert "stages.ppo.ptx.feedback: only data.sources can have votes" in capsys.readouterr().out


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_no_vote_on_a_held_out_prompt_is_trained_on(tmp_path: Path, system: str | None) -> None:
    """Also not where the page has another system prompt than the data, or the prompt follows another question."""
    run = RunDir(tmp_path / "served")
    run.path.mkdir()
    run.job_yaml.write_text("")
    data = spec_of({"demo": 120, "system": system}, stages=("dpo",), held_out=0.2)
    asked = {each.sample.turns[-1][1]: each.held_out for each in stage_samples(data, "dpo")}
    for number, prompt in enumerate(asked):
        before = {1: TURNS[:1], 2: TURNS[1:3]}.get(number % 3, [])
        messages = [*before, VoteMessage(role="user", content=prompt)]
        feedback.append(run.feedback, pair(f"vote{number}", "left", messages=messages))
    votes: dict[str, object] = {"feedback": str(run.path), "kind": "pairs"}
    both = spec_of({"demo": 120, "system": system, "weight": 0.1}, votes, stages=("sft", "reward"), held_out=0.2)
    voted = [each for stage in ("sft", "reward") for each in stage_samples(both, stage) if "votes" in each.sample.where]
    assert {each.sample.turns[-1][1] for each in voted} == set(asked)
    assert all(each.held_out for each in voted if asked[each.sample.turns[-1][1]])
    assert sum(not each.held_out for each in voted) > 30
