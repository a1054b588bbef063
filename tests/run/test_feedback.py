"""Stored votes survive several writers, crashes, full disks and deletion, and stay in their folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import feedback
from hpc_rlhf.run.feedback import MAX_RECORD, Vote
from tests.run.votes import pair, thumbs
from tests.small_disk import mounted

WRITER = """
import sys
from pathlib import Path
from hpc_rlhf.run import feedback
from tests.run.votes import thumbs
for number in range(40):
    feedback.append(Path(sys.argv[1]), thumbs(f"{sys.argv[2]}{number}", comment=sys.argv[2] * 3000))
"""


def stored(folder: Path) -> list[Vote]:
    return [vote for _, vote in feedback.read(folder) if vote is not None]


def test_votes_come_back_as_given(tmp_path: Path) -> None:
    folder = tmp_path / "run/feedback"
    assert stored(folder) == []
    votes = [thumbs("a", comment="one\nline\u2028\x85 €\x1b[2J"), pair("b", "both_bad", user="me")]
    for vote in votes:
        feedback.append(folder, vote)
    assert stored(folder) == votes
    assert [where for where, _ in feedback.read(folder)] == [f"{folder}/votes-000001.jsonl:{n}" for n in (1, 2)]
    assert all(path.stat().st_mode & 0o027 == 0 for path in (folder, *folder.iterdir()))


def test_a_line_is_as_documented(tmp_path: Path) -> None:
    """docs/feedback.md shows this line."""
    feedback.append(tmp_path, pair("8f14e45f", "right", comment="B knows more."))
    line = (tmp_path / "votes-000001.jsonl").read_text()
    assert json.loads(line) == {
        "id": "8f14e45f", "time": 1.5, "kind": "pair", "vote": "right", "comment": "B knows more.",
        "models": [{"name": "sft", "manifest": "5" * 64}, {"name": "ppo", "manifest": "9" * 64}],
        "sampling": {"temperature": 0.7, "seed": 3},
        "messages": [{"role": "user", "content": "What colour is snow?"}],
        "responses": ["White.", "Snow is white."],
    }  # fmt: skip


def test_a_later_line_replaces_the_vote_with_its_id(tmp_path: Path) -> None:
    for vote in (thumbs("a", "up"), thumbs("b", "up"), thumbs("a", "down"), thumbs("a", "down")):
        feedback.append(tmp_path, vote)
    assert [(vote.id, vote.vote) for vote in stored(tmp_path)] == [("b", "up"), ("a", "down")]


def test_a_torn_line_is_counted_and_the_next_vote_is_whole(tmp_path: Path) -> None:
    feedback.append(tmp_path, thumbs("a"))
    path = tmp_path / "votes-000001.jsonl"
    whole = path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole + whole[:length])
        feedback.append(tmp_path, thumbs("b"))
        read = [vote and vote.id for _, vote in feedback.read(tmp_path)]
        assert read == ["a", None, "b"], length


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    votes = [vote for _, vote in feedback.read(tmp_path)]
    assert None not in votes
    assert sorted(vote.id for vote in votes if vote) == sorted(f"{name}{n}" for name in "abc" for n in range(40))


def test_a_large_file_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MAX_FILE", 2000)
    for number in range(20):
        feedback.append(tmp_path, thumbs(str(number)))
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) > 2
    assert all(file.stat().st_size <= 2000 for file in files)
    assert [vote.id for vote in stored(tmp_path)] == list(map(str, range(20)))


def test_a_vote_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HpcRlhfError, match=r"the vote has 1,\d+,\d+ bytes"):
        feedback.append(tmp_path, thumbs("a", comment="x" * MAX_RECORD))
    assert stored(tmp_path) == []


def test_on_a_full_disk_a_vote_is_refused_and_the_others_stay(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "1m") as disk:
        acknowledged = []

        def fill() -> None:
            for number in range(1000):
                feedback.append(disk / "feedback", thumbs(str(number), comment="x" * 5000))
                acknowledged.append(str(number))

        with pytest.raises(HpcRlhfError, match="the vote cannot be stored: "):
            fill()
        assert len(acknowledged) > 10
        assert [vote and vote.id for _, vote in feedback.read(disk / "feedback")] == acknowledged


def test_deleted_votes_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MAX_FILE", 2000)
    for number in range(12):
        feedback.append(tmp_path, thumbs(str(number), user="eve" if number % 2 else "bob"))
    feedback.append(tmp_path, thumbs("1", "down", user="eve"))
    assert feedback.delete(tmp_path, lambda vote: vote.user == "eve") == 6
    assert [vote.id for vote in stored(tmp_path)] == list(map(str, range(0, 12, 2)))
    assert b"eve" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert feedback.delete(tmp_path, lambda vote: vote.user == "eve") == 0
    feedback.append(tmp_path, thumbs("last"))
    assert stored(tmp_path)[-1].id == "last"


@pytest.mark.parametrize("id", ["../../evil", "a/b", "", "a\n", "a" * 65, "é", ".", "votes-000001.jsonl"])
def test_an_id_is_no_path(id: str) -> None:
    with pytest.raises(ValidationError):
        thumbs(id)


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "feedback", tmp_path / "elsewhere"
    folder.mkdir()
    os.symlink(elsewhere, folder / "votes-000001.jsonl")
    with pytest.raises(HpcRlhfError, match="cannot be stored"):
        feedback.append(folder, thumbs("a"))
    elsewhere.touch()
    with pytest.raises(HpcRlhfError, match="cannot be stored"):
        feedback.append(folder, thumbs("a"))
    assert elsewhere.read_bytes() == b""
