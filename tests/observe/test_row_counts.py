"""What became of the rows of the data is in status, its JSON and the report."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from hpc_rlhf.cli import main
from hpc_rlhf.observe.report.page import make_page
from hpc_rlhf.observe.status import read_status
from hpc_rlhf.observe.terminal.board import Board
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from tests.observe.report_runs import make_reported_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    run = make_reported_run(tmp_path / "run", monkeypatch)
    for name, lost in (("mixture-0", 0), ("older", 9), ("newer", 2)):
        counts = SourceCounts("<i>a.jsonl")
        for number in range(20):
            counts.add(Outcome.TRAINED if number >= lost else Outcome.USER_LAST, f"a.jsonl:{number + 1}")
        folder = run.stage("sft").data / name
        folder.mkdir(parents=True)
        manifest.write(folder, {"rows": {}, "sources": [counts.to_dict()]})
    return run


def test_status_and_report_show_what_was_lost(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    statuses = read_status(run)
    console = Console(file=StringIO(), width=300)
    console.print(Board(300, live=False).notes(statuses))
    note = "data: <i>a.jsonl, 20 rows: 2 that end with the user's turn (first: a.jsonl:1)"
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().count("data:") == 1
    assert note in console.file.getvalue()

    assert main(["status", str(run.path), "--json"]) == 0
    (stage,) = (stage for stage in json.loads(capsys.readouterr().out)["stages"] if stage["stage"] == "sft")
    mixture, own = stage["data"]
    assert (mixture["lost"], own["lost"]) == (0, 0.1)
    assert own["outcomes"] == {
        "trained": {"rows": 18, "first": "a.jsonl:3"},
        "user last": {"rows": 2, "first": "a.jsonl:1"},
    }

    page = make_page(run)
    assert "sft: 10% of the rows of &lt;i&gt;a.jsonl are left out" in page
    assert "<i>a.jsonl" not in page
