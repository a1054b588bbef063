"""The command itself: lookup of verbs, and exit codes and messages for each kind of failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import hpc_rlhf.cli
from hpc_rlhf.cli import VERBS, main
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError

CLI = [sys.executable, "-m", "hpc_rlhf.cli"]


def run(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *args], capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> object:
    """Makes the verb `check` raise a given exception."""

    def install(error: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise error

        monkeypatch.setattr(hpc_rlhf.cli.LazyGroup, "get_command", lambda *_: command)

    return install


def test_help_and_version() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    assert run("--version").stdout == f"hpc-rlhf {hpc_rlhf.__version__}\n"


def test_unknown_verb_gets_a_suggestion() -> None:
    done = run("chekc")
    assert done.returncode == 2
    assert done.stderr.endswith("Error: No such command 'chekc'. Did you mean check?\n")


def test_user_error_is_one_message_with_its_exit_code(failing, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    failing(HpcRlhfError("it broke", where="here", hint="fix it", exit_code=RUN_FAILED))
    assert main(["check"]) == RUN_FAILED
    assert capsys.readouterr() == ("", "error: here: it broke\n  hint: fix it\n")


def test_interrupt_is_quiet(failing, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    failing(KeyboardInterrupt())
    assert main(["check"]) == 130
    assert capsys.readouterr().err.strip() == ""


def test_bug_is_one_line_and_a_file(failing, capsys, monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(ZeroDivisionError("oh"))
    assert main(["check"]) == RUN_FAILED
    message = capsys.readouterr().err
    (report,) = tmp_path.iterdir()
    assert message == f"error: this is a bug in hpc-rlhf (ZeroDivisionError: oh); please report it with {report}\n"
    assert "Traceback" in report.read_text()
    assert report.stat().st_mode & 0o077 == 0


def test_debug_shows_the_traceback(failing, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HPC_RLHF_DEBUG", "1")
    failing(ZeroDivisionError("oh"))
    assert main(["check"]) == RUN_FAILED
    assert "Traceback" in capsys.readouterr().err


def test_unusable_file_is_not_reported_as_a_bug(failing, capsys) -> None:  # type: ignore[no-untyped-def]
    failing(PermissionError(13, "Permission denied", "/x/y"))
    assert main(["check"]) == RUN_FAILED
    assert capsys.readouterr().err == "error: /x/y: Permission denied\n"


def test_bug_is_one_line_if_no_file_can_be_written(failing, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("tempfile.tempdir", "/dev/null")
    failing(ZeroDivisionError("oh"))
    assert main(["check"]) == RUN_FAILED
    assert capsys.readouterr().err.endswith("; please report it with the traceback that HPC_RLHF_DEBUG=1 prints\n")


@pytest.mark.parametrize("arguments", ["--help", "schema", "check nothing.yaml"])
def test_full_device_is_not_reported_as_a_bug(arguments: str) -> None:
    done = subprocess.run(["bash", "-c", f'"$@" {arguments} >/dev/full', "x", *CLI], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (RUN_FAILED, "error: No space left on device\n")


def test_closed_standard_streams_do_no_harm(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" init --actor a/b --deployment single_gpu <&- >&- 2>&-', "x", *CLI], cwd=tmp_path
    )
    assert done.returncode == 0
    assert "wrote" not in (tmp_path / "b.yaml").read_text()
    plan = subprocess.run(["bash", "-c", '"$@" plan b.yaml >&-', "x", *CLI], cwd=tmp_path, capture_output=True)
    assert (plan.returncode, plan.stdout) == (0, b"")


@pytest.mark.parametrize("verb", ["--help", "schema"])
def test_reader_that_quits_early_is_no_error(verb: str) -> None:
    done = subprocess.run(["bash", "-c", f'"$@" {verb} | head -c 1', "x", *CLI], capture_output=True, text=True)
    assert done.stderr == ""


def test_output_that_the_terminal_cannot_encode(tmp_path: Path) -> None:
    done = run("check", "€.yaml", cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stdout) == (2, "\\u20ac.yaml: cannot read it: No such file or directory\n")


def test_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xff.yaml")
    (tmp_path / name).write_text("name: x\n")
    done = run("check", name, cwd=tmp_path)
    assert done.returncode == 2
    assert ".yaml:1:1: run_dir: is missing" in done.stdout
