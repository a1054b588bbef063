"""hpc-rlhf feedback: win rates, filters, exports and deletion."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.intervals import share
from hpc_rlhf.run import feedback
from hpc_rlhf.run.feedback import RatedModel, Vote, VoteMessage
from hpc_rlhf.run.layout import RunDir
from tests.co_user import NOBODY, as_root
from tests.run.votes import pair, thumbs

VOTES = [
    thumbs("a", "up", user="eve"),
    thumbs("b", "down", "ppo", comment="=1+1"),
    *(pair(f"left{n}", "left", ("ppo", "sft")) for n in range(5)),
    *(pair(f"right{n}", "right", ("sft", "ppo"), user="eve") for n in range(2)),
    pair("lost", "left", ("sft", "ppo")),
    pair("tie", "tie"),
    pair("bad", "both_bad"),
]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir(mode=0o700)
    run.job_yaml.write_text("")
    for vote in VOTES:
        feedback.append(run.feedback, vote)
    return run


def printed(capsys: pytest.CaptureFixture[str], run: RunDir, *options: str) -> str:
    assert main(["feedback", str(run.path), *options]) == 0
    return capsys.readouterr().out


def test_win_rates_count_both_sides_and_half_of_ties(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(printed(capsys, run, "--json"))
    (result,) = facts["pairs"]
    assert {name: result[name] for name in ("model", "against", "wins", "losses", "ties", "both_bad")} == {
        "model": "ppo", "against": "sft", "wins": 7, "losses": 1, "ties": 1, "both_bad": 1,
    }  # fmt: skip
    expected = share(8, 10)
    assert result["win_rate"] == {"estimate": 0.8, "low": expected.low, "high": expected.high}
    assert [(one["model"], one["up"], one["down"]) for one in facts["thumbs"]] == [("ppo", 0, 1), ("sft", 1, 0)]
    assert [vote["id"] for vote in facts["votes"]] == [vote.id for vote in VOTES]
    text = printed(capsys, run)
    assert "ppo    sft         7       1     1         1  80.0% (49.0% to 94.3%)" in text
    assert "What colour is snow?" in text


def test_two_responses_of_one_model_are_counted_without_a_win_rate(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, vote in enumerate(("left", "left", "right", "tie")):
        feedback.append(run.feedback, pair(f"twice{number}", vote, ("ppo", "ppo"), user="twice"))
    (result,) = json.loads(printed(capsys, run, "--json", "--user", "twice"))["pairs"]
    assert (result["wins"], result["losses"], result["ties"], result["win_rate"]) == (3, 3, 1, None)
    assert "ppo    ppo         3       3     1         0  -" in printed(capsys, run, "--user", "twice")


def test_models_of_one_name_are_distinguished_by_their_manifests(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [RatedModel(name="ppo", manifest="9" * 64), RatedModel(name="ppo", manifest="a" * 64)]
    feedback.append(run.feedback, pair("rounds", "right").model_copy(update={"models": models}))
    facts = json.loads(printed(capsys, run, "--json", "--id", "rounds"))
    assert [(one["model"], one["against"], one["wins"]) for one in facts["pairs"]] == [
        ("ppo (99999999)", "ppo (aaaaaaaa)", 0)
    ]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (["--kind", "thumbs"], ["a", "b"]), (["--user", "eve"], ["a", "right0", "right1"]),
        (["--vote", "both_bad"], ["bad"]), (["--kind", "thumbs", "--model", "ppo"], ["b"]),
        (["--id", "tie", "--id", "lost", "--id", "none"], ["lost", "tie"]), (["--user", "bob"], []),
    ],
)  # fmt: skip
def test_votes_can_be_filtered(
    run: RunDir, capsys: pytest.CaptureFixture[str], options: list[str], ids: list[str]
) -> None:
    assert [vote["id"] for vote in json.loads(printed(capsys, run, "--json", *options))["votes"]] == ids


def test_an_export_has_every_vote(run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = printed(capsys, run, "--export", "-").splitlines()
    assert [Vote.model_validate_json(line) for line in lines] == VOTES
    printed(capsys, run, "--export", str(tmp_path / "votes.jsonl"))
    assert (tmp_path / "votes.jsonl").read_text().splitlines() == lines
    printed(capsys, run, "--export", str(tmp_path / "votes.csv"))
    with (tmp_path / "votes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [vote.id for vote in VOTES]
    assert (rows[2]["model"], rows[2]["other_model"], rows[2]["other_response"]) == ("ppo", "sft", "Snow is white.")
    assert rows[1]["comment"] == "'=1+1", "no formula for a spreadsheet"
    assert main(["feedback", str(run.path), "--export", "votes.xlsx"]) == 2
    assert "exports are .jsonl or .csv files" in capsys.readouterr().err


def test_votes_are_deleted_by_user_or_id_only(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["feedback", str(run.path), "--kind", "pair", "--delete"]) == 2
    assert "--delete needs --id or --user" in capsys.readouterr().err
    assert main(["feedback", str(run.path), "--user", "eve", "--delete"]) == 0
    assert capsys.readouterr().err == "deleted 3 votes\n"
    assert main(["feedback", str(run.path), "--id", "tie", "--delete"]) == 0
    assert "eve" not in printed(capsys, run, "--export", "-")
    assert len(printed(capsys, run, "--export", "-").splitlines()) == len(VOTES) - 4


def test_text_of_strangers_cannot_control_the_terminal(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = [VoteMessage(role="user", content="\x1b[2J\u202ehi")]
    feedback.append(run.feedback, thumbs("c").model_copy(update={"messages": hostile, "comment": "\x1b]0;x\x07"}))
    for options in ([], ["--json"], ["--export", "-"]):
        assert not {"\x1b", "\x07"} & set(printed(capsys, run, *options)), options


def test_damaged_lines_are_counted_and_no_votes_are_no_error(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with next(run.feedback.glob("*.jsonl")).open("a") as file:
        file.write('{"id": "torn')
    assert main(["feedback", str(run.path)]) == 0
    assert "left out 1 damaged line\n" in capsys.readouterr().err
    assert json.loads(printed(capsys, run, "--json"))["damaged"] == 1
    empty = RunDir(run.path.parent / "empty")
    empty.path.mkdir()
    empty.job_yaml.write_text("")
    assert main(["feedback", str(empty.path)]) == 0
    assert "no votes yet" in capsys.readouterr().err
    assert list(empty.path.iterdir()) == [empty.job_yaml], "reading writes nothing"


@as_root
def test_nobody_deletes_from_another_users_run(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    os.chown(run.path, NOBODY, NOBODY)
    assert main(["feedback", str(run.path), "--user", "eve", "--delete"]) == 2
    assert "this run belongs to" in capsys.readouterr().err
    assert "eve" in printed(capsys, run, "--export", "-")
