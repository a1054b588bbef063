"""Runs that were moved or copied: no verb acts on the folder where they were made, until they are adopted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.launch.jobs import find_jobs
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run import acting, manifest, run_index
from hpc_rlhf.run.events import Submitted, Submitting
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.load import read_spec
from tests.launch.specs import make_spec


@pytest.fixture
def made(tmp_path: Path) -> RunDir:
    """A run with a finished SFT stage and submitted jobs."""
    run = RunDir(tmp_path / "made")
    models = {"sft": {}, "reward": {}, "ppo": {}, "eval": {}}
    spec = make_spec(run.path, **models).model_copy(update={"name": "moving"})
    with claim(spec, "test"):
        prepare(spec, run)
    for stage in spec.stage_names:
        Ledger(run.ledger).append(Submitting(stage, token=f"token-{stage}"))
        Ledger(run.ledger).append(Submitted(stage, token=f"token-{stage}", job_id=str(90_000_000 + len(stage))))
    run.stage("sft").model.mkdir()
    manifest.write(run.stage("sft").model, {"stage": "sft", "step": 1, "seconds": 1.0, "metrics": {}})
    run.stage("ppo").trackers.write_text("{}")
    run.stage("ppo").serve_token.write_text("known to the original's owner")
    return run


def move(made: RunDir, there: Path) -> RunDir:
    return RunDir(Path(shutil.move(made.path, there)))


def copy(made: RunDir, there: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(made.path, there, symlinks=True)))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ACTING = (
    ("run", "RUN/job.yaml"),
    ("submit", "RUN/job.yaml", "--dry-run"),
    ("submit", "RUN/job.yaml"),
    ("plan", "RUN/job.yaml"),
    ("doctor", "RUN/job.yaml"),
    ("eval", "RUN"),
    ("eval", "RUN/job.yaml", "--prompts", "3"),
    ("heal", "RUN"),
    ("heal", "--sentinel", "RUN/job.yaml"),
    ("cancel", "RUN"),
    ("cancel", "RUN/job.yaml"),
    ("serve", "RUN", "--slurm"),
)


@pytest.mark.parametrize("how", [move, copy])
@pytest.mark.parametrize("words", ACTING, ids=" ".join)
def test_no_verb_acts_on_a_run_elsewhere(
    made: RunDir, tmp_path: Path, how: Callable[[RunDir, Path], RunDir], words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = how(made, tmp_path / "else where")
    before = contents(tmp_path)
    assert main([word.replace("RUN", str(run.path)) for word in words]) == 2
    error = capsys.readouterr().err
    assert f"made in {made.path}" in error
    assert f"hpc-rlhf relocate '{run.path}'" in error
    assert contents(tmp_path) == before


def test_verbs_that_read_show_the_run_that_was_named(
    made: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(made, tmp_path / "copy")
    for argument in (run.path, run.job_yaml):
        assert main(["status", str(argument), "--json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["run_dir"] == str(run.path)
        assert f"made in {made.path}" in printed.err


def test_a_new_run_may_start_from_its_spec(made: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy(made, tmp_path / "copy")
    new = f"run_dir={tmp_path / 'new'}"
    assert main(["submit", str(run.job_yaml), "--dry-run", "--set", new]) == 0
    assert main(["relocate", str(run.path)]) == 0
    assert main(["eval", str(run.path), "--set", new]) == 2
    assert f"would write to {tmp_path / 'new'}" in capsys.readouterr().err


@pytest.mark.parametrize("how", [move, copy])
def test_relocate_adopts_it(
    made: RunDir, tmp_path: Path, how: Callable[[RunDir, Path], RunDir], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", "/nowhere")
    run = how(made, tmp_path / "there")
    original = contents(made.path)
    assert main(["relocate", str(run.path)]) == 0
    acting.check(run)
    assert read_spec(run.job_yaml).run_dir == str(run.path)
    for path in (run.job_yaml, run.plan_json, *run.scripts.rglob("*")):
        assert str(made.path) not in path.read_text(), path
    assert run.path in run_index.known()
    assert manifest.is_done(run.stage("sft"))
    assert not find_jobs(run).latest
    assert StageHistory.read(run, "ppo").job_id is None
    assert run.stage("ppo").trackers.exists() == run.stage("ppo").serve_token.exists() == (how is move)
    assert contents(made.path) == original
    assert main(["submit", str(run.job_yaml), "--dry-run"]) == 0
    assert str(made.path) not in capsys.readouterr().out
    before = contents(tmp_path)
    assert main(["relocate", str(run.path)]) == 0
    assert contents(tmp_path) == before


def test_a_run_reached_by_a_link_was_not_moved(made: RunDir, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made.path)
    acting.check(RunDir(tmp_path / "link"))
    assert main(["submit", str(tmp_path / "link/job.yaml"), "--dry-run"]) == 0


def test_another_run_may_have_taken_its_place(made: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = move(made, tmp_path / "moved")
    spec = make_spec(made.path)
    with claim(spec, "test"):
        prepare(spec, made)
    Ledger(made.ledger).append(Submitting("sft", token="another"))
    assert main(["cancel", str(run.path)]) == 2
    assert "this run was moved" in capsys.readouterr().err


def test_a_run_whose_folder_was_closed_is_a_copy(made: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy(made, tmp_path / "there")

    def opened(path: Path, *args: Any, **more: Any) -> Any:
        if path.is_relative_to(made.path):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *args, **more)

    monkeypatch.setattr(Path, "open", opened)
    assert acting.is_copy(run, made.path)


@pytest.mark.parametrize("how", [move, copy])
def test_a_link_to_a_stage_of_another_run_is_kept(tmp_path: Path, how: Callable[[RunDir, Path], RunDir]) -> None:
    sweep = tmp_path / "sweep"
    lender, borrower = RunDir(sweep / "one"), RunDir(sweep / "two")
    for run in (lender, borrower):
        spec = make_spec(run.path)
        with claim(spec, "test"):
            prepare(spec, run, lent={"sft": lender} if run is borrower else {})
    lender.stage("sft").trackers.write_text("{}")
    (tmp_path / "deeper").mkdir()
    run = how(borrower, tmp_path / "deeper/two")
    assert main(["relocate", str(run.path)]) == 0
    assert run.lender("sft") == lender
    assert lender.stage("sft").trackers.exists()
