"""What the dashboard's server says, to whom, and how much it reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.observe.dashboard.board import Board
from hpc_rlhf.observe.gather import RunRecord
from hpc_rlhf.observe.status import read_status
from hpc_rlhf.run.layout import RunDir
from tests.observe.dashboard.running import TOKEN, watching
from tests.observe.report_runs import add_line, evaluate, make_reported_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs, one of them two levels deep and with the name of another, and three that cannot be read."""
    runs = tmp_path / "runs"
    make_reported_run(runs / "one", monkeypatch, steps=20, interruptions=2)
    make_reported_run(runs / "below/two", monkeypatch, steps=10)
    rename(make_reported_run(runs / "three", monkeypatch, steps=10), "another")
    for name, plan in (("damaged", "{"), ("nonsense", '{"name": "x", "jobs": [{"stage": "sft"}]}')):
        shutil.copytree(runs / "one", runs / name)
        (runs / name / "plan.json").write_text(plan)
    shutil.copytree(runs / "one", runs / "strange")
    (runs / "strange/stages/sft/model/manifest.json").unlink()
    add_line(RunDir(runs / "strange").stage("sft").metrics, kind="train", step="many", total_steps=[], time={})
    return runs


def rename(run: RunDir, name: str) -> None:
    run.plan_json.write_text(json.dumps({**json.loads(run.plan_json.read_text()), "name": name}))


def get(base: str, path: str, **headers: str) -> tuple[int, str, dict[str, Any]]:
    """The status, ETag and JSON of a response."""
    connection = HTTPConnection(urlsplit(base).netloc)
    connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}", **headers})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers.get("ETag", ""), json.loads(body) if body else {}


@pytest.fixture
def base(folder: Path) -> Iterator[str]:
    with watching(folder) as base:
        yield base


def test_rows_agree_with_status_and_unreadable_runs_are_counted(folder: Path) -> None:
    rows, left_out = Board(folder).rows()
    assert left_out == 3
    by_place = {row.place: row for row in rows}
    assert {place: row.label for place, row in by_place.items()} == {
        "one": "test (one)", "below/two": "test (below/two)", "three": "another"
    }  # fmt: skip
    row = by_place["one"]
    sft = next(status for status in read_status(RunDir(folder / "one")) if status.stage == "sft")
    assert len(sft.goodput.interruptions) == 2
    assert row.interruptions == "2 interruptions: 2 preempted"
    assert row.ettr is not None
    assert 0 < row.ettr < 1
    assert (row.line.done, row.line.stages, row.progress) == (3, 3, 1.0)


def test_only_changed_runs_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("hpc_rlhf.observe.dashboard.board.time.monotonic", lambda: clock[0])
    read: list[str] = []
    read_record = RunRecord.read

    def counted(run: RunDir, *known: Any) -> RunRecord:
        read.append(run.path.name)
        return read_record(run, *known)

    monkeypatch.setattr(RunRecord, "read", counted)
    board = Board(folder)
    board.rows()
    assert sorted(read) == ["one", "strange", "three", "two"]
    read.clear()
    clock[0] += 5
    board.rows()
    assert read == []
    add_line(RunDir(folder / "one").stage("ppo").metrics, kind="train", step=21, total_steps=21, time=1.0)
    clock[0] += 5
    board.rows()
    assert read == ["one"]
    rename(RunDir(folder / "three"), "test")
    clock[0] += 5
    assert {row.label for row in board.rows()[0]} == {"test (one)", "test (below/two)", "test (three)"}
    shutil.rmtree(folder / "one")
    clock[0] += 60
    assert {row.place for row in board.rows()[0]} == {"below/two", "three"}


def test_only_those_with_the_token_get_anything(base: str) -> None:
    assert get(base, "/runs")[0] == 200
    assert get(base, "/runs", Authorization="Bearer wrong")[0] == 401
    assert get(base, "/details?run=x", Authorization="")[0] == 401
    assert get(base, "/runs", Host="rebound.example.org")[0] == 403
    assert get(base, "/details?run=../../etc/passwd")[2]["charts"] == {}


def test_an_unchanged_answer_is_not_sent_again(base: str, folder: Path) -> None:
    _, tag, facts = get(base, "/runs")
    assert get(base, "/runs", **{"If-None-Match": tag})[0] == 304
    assert facts["left_out"] == 3
    query = "&".join(f"run={run['id']}" for run in facts["runs"])
    status, tag, details = get(base, f"/details?{query}")
    assert (status, list(details["charts"])) == (200, ["sft", "reward", "ppo"])
    assert get(base, f"/details?{query}", **{"If-None-Match": tag})[0] == 304


def test_final_models_of_several_runs_are_side_by_side(base: str, folder: Path) -> None:
    for name, wins in (("one", "A"), ("three", "B")):
        evaluate(RunDir(folder / name), "Why?", {"sft": "Because.", "ppo": f"By {wins}.", "reference": "So."})
    ids = {run["place"]: run["id"] for run in get(base, "/runs")[2]["runs"]}
    alone = get(base, f"/details?run={ids['one']}")[2]
    assert "Because." in alone["responses"]
    both = get(base, f"/details?run={ids['three']}&run={ids['one']}")[2]
    assert both["responses"].index("By B.") < both["responses"].index("By A.")
    assert "Because." not in both["responses"]
    assert both["evaluation"].count('<td class="number">70% (60–79)</td>') == 2
    loss = next(chart for chart in both["charts"]["sft"] if chart["title"] == "loss")
    assert loss["places"] == {"another": 0, "test (one)": 1}
    assert (len(loss["steps"]), loss["lines"]["another"][10:]) == (20, [None] * 10)


def test_the_command_prints_where_the_page_is_and_ends_with_ctrl_c(folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "hpc_rlhf.cli", "dashboard", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address, tunnel = process.stdout.readline().strip(), process.stdout.readline()
    base, token = address.split("/#")
    assert base == f"http://127.0.0.1:{port}"
    assert f"-L {port}:127.0.0.1:{port}" in tunnel
    assert get(base, "/runs", Authorization=f"Bearer {token}")[0] == 200
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(20) in (0, 130)
    again = subprocess.run([*command[:4], str(folder / "nowhere")], capture_output=True, text=True)
    assert (again.returncode, "is not a folder" in again.stderr) == (2, True)
