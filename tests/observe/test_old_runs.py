"""Run directories written before modules, events and names changed are still read: one finished, one that
died in PPO."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.launch.auto import resolve
from hpc_rlhf.launch.changes import differences
from hpc_rlhf.run import manifest
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.load import load_spec, read_spec
from hpc_rlhf.train.data.sources import conversation_of, read, stage_samples
from hpc_rlhf.train.data.tokenized import _facts, ends_turns


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


def test_runs_keep_the_defaults_that_they_began_with(runs: Path) -> None:
    """Also when they are submitted again by a spec that leaves these fields out, as it did before they changed."""
    run = RunDir(runs / "died")
    run.job_yaml.write_text(run.job_yaml.read_text().replace("/scratch/runs/died", str(run.path)))
    begun = read_spec(run.job_yaml)
    assert (begun.data.version, begun.stages.sft.answer_only, begun.stages.sft.warmup) == (1, False, 0)
    left_out = re.sub(r"\n +(warmup: 0|answer_only: \S+)(?=\n)", "", run.job_yaml.read_text())
    (runs / "again.yaml").write_text(left_out)
    spec, _ = resolve(load_spec(runs / "again.yaml"))
    assert not differences(begun, spec)
    (runs / "other.yaml").write_text(left_out.replace("held_out: 0.05", "held_out: 0.05\n  version: 2"))
    other, _ = resolve(load_spec(runs / "other.yaml"))
    assert [path for path, _, _ in differences(begun, other)] == ["data.version"]


def test_runs_keep_their_data(runs: Path) -> None:
    """The digests are from version 0.1.0: of what names the token data, and of the samples of stages."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    spec = read_spec(runs / "died" / "job.yaml")
    assert digest(json.dumps(_facts(spec), sort_keys=True)) == "76929307ea7c0451"
    for stage, before in {"sft": "7787894e7da6e614", "ppo": "418743e414c93cce"}.items():
        trained = [(sample.prompt, sample.chosen) for sample, held_out, _ in stage_samples(spec, stage) if not held_out]
        assert digest(repr(trained)) == before
    assert not ends_turns(spec, "sft")
    assert not ends_turns(spec, None)
    assert all(conversation_of(sample, spec) == sample.prompt for sample in read(spec.data.sources[0], spec.seed))


def test_checkpoints_have_valid_manifests(runs: Path) -> None:
    for checkpoint in (runs / "died/stages/ppo/checkpoints").glob("step-*"):
        facts = manifest.read(checkpoint)
        assert facts is not None
        assert {"attempt", "part", "state", "step"} <= facts.keys()
