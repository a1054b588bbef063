"""Run directories written before modules, events and names changed are still read: one finished, one that
died in PPO."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.run import manifest
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.load import read_spec


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Both runs; files of the models have the right sizes, but no content."""
    with tarfile.open(Path(__file__).with_name("old_runs.tar.gz")) as archive:
        archive.extractall(tmp_path)
    for path in tmp_path.glob("*/stages/*/model/manifest.json"):
        for name, facts in json.loads(path.read_text())["files"].items():
            if not (path.parent / name).exists():
                with (path.parent / name).open("wb") as file:
                    file.truncate(facts["bytes"])
    return tmp_path


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


def test_status_reads_both(runs: Path, output: Callable[..., str]) -> None:
    finished = json.loads(output("status", runs / "finished", "--json"))
    assert [stage["state"] for stage in finished["stages"]] == ["done"] * 3
    died = json.loads(output("status", runs / "died", "--json"))
    assert [stage["state"] for stage in died["stages"]][:2] == ["done", "done"]
    ppo = died["stages"][2]
    assert ppo["state"] not in ("done", "running")
    assert ppo["attempts"] == 3
    assert ppo["step"] == 8
    assert sum(stage["goodput"]["lost"] for stage in died["stages"]) > 0


def test_new_defaults_are_not_theirs(runs: Path) -> None:
    assert read_spec(runs / "died" / "job.yaml").stages.reward.center_scores is False


def test_every_event_is_understood(runs: Path) -> None:
    for run in (runs / "finished", runs / "died"):
        ledger = Ledger(RunDir(run).ledger)
        assert len(list(ledger.events())) == len(ledger.path.read_text().splitlines())
    assert StageHistory(Ledger(RunDir(runs / "died").ledger).events("ppo"))


def test_report_and_compare_and_list_read_both(runs: Path, tmp_path: Path, output: Callable[..., str]) -> None:
    for run in ("finished", "died"):
        output("report", runs / run, "--out", tmp_path / f"{run}.html")
        assert "<svg" in (tmp_path / f"{run}.html").read_text()
    compared = output("compare", runs / "finished", runs / "died")
    assert "finished" in compared
    assert "died" in compared
    assert "died" in output("list", runs)


def test_an_evaluation_that_is_done_is_shown(runs: Path, output: Callable[..., str]) -> None:
    assert "dpo" in output("eval", runs / "finished")


def test_checkpoints_have_valid_manifests(runs: Path) -> None:
    for checkpoint in (runs / "died/stages/ppo/checkpoints").glob("step-*"):
        facts = manifest.read(checkpoint)
        assert facts is not None
        assert {"attempt", "part", "state", "step"} <= facts.keys()
