"""The command itself: lookup of verbs, and exit codes and messages for each kind of failure."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest

import hpc_rlhf.cli
from hpc_rlhf.cli import VERBS, main
from hpc_rlhf.cli.colours import coloured
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from tests.spec.texts import GOOD

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


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "hpc_rlhf", "--version"], capture_output=True, text=True)
    assert done.stdout == f"hpc-rlhf {hpc_rlhf.__version__}\n"


def test_versions_of_what_is_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["version"]) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (lines["hpc-rlhf"], lines["torch"]) == (hpc_rlhf.__version__, metadata.version("torch"))
    assert "Slurm" not in lines
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["Slurm"] is None


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [
        ("hpc-rlhf su", 1, ["plain,submit"]),
        ("hpc-rlhf --ver", 1, ["plain,--version"]),
        ("hpc-rlhf submit --dry", 2, ["plain,--dry-run"]),
        ("hpc-rlhf init --deployment multi", 3, ["plain,multi_node"]),
        ("hpc-rlhf status my-", 2, ["file,"]),
    ],
)
def test_completion(words: str, at: int, expected: list[str]) -> None:
    env = {**os.environ, "_HPC_RLHF_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    assert run(env=env).stdout.splitlines() == expected


def test_errors_are_coloured_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    red, yellow, cyan, end = "\x1b[31m\x1b[1m", "\x1b[33m\x1b[1m", "\x1b[36m\x1b[1m", "\x1b[0m"
    for text, expected in (
        ("error: a: b\n  hint: c", f"{red}error{end}: a: b\n{cyan}  hint{end}: c"),
        ("my job.yaml:4:3: slurm.x: no", f"{red}my job.yaml:4:3{end}: slurm.x: no"),
        ("--set a.b: no", f"{red}--set a.b{end}: no"),
        ("Usage: x\n\nError: No such option", f"Usage: x\n\n{red}Error{end}: No such option"),
        ("job.yaml: warning: few rows", f"{yellow}job.yaml: warning{end}: few rows"),
        ("job.yaml: ok", "job.yaml: ok"),
    ):
        assert coloured(text, Terminal()) == expected
        assert coloured(text, io.StringIO()) == text
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert coloured("error: a", Terminal()) == "error: a"


def test_a_spec_from_standard_input(tmp_path: Path) -> None:
    text = GOOD.replace("runs/good", str(tmp_path / "run"))
    done = run("check", "-", input=text.replace("lr: 1e-4", "lr: no"), cwd=tmp_path)
    assert (done.returncode, "-:17:9: stages.sft.lr: must be a number" in done.stdout) == (2, True)
    done = run("submit", "-", "--dry-run", input=text, cwd=tmp_path)
    assert (done.returncode, "would submit" in done.stdout) == (0, True)
    done = run("status", "-", input=text, cwd=tmp_path)
    assert (done.returncode, "it has no job.yaml" in done.stderr or "does not exist" in done.stderr) == (2, True)


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "xx_YY.UTF-8"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}])
def test_any_locale_will_do(locale: dict[str, str], tmp_path: Path) -> None:
    job = tmp_path / "größe.yaml"
    job.write_text(GOOD.replace("runs/good", str(tmp_path / "läufe")) + "# ☃\n", encoding="utf-8")
    done = run("plan", str(job), env={**os.environ, **locale})
    assert done.returncode == 0, done.stderr


def test_a_locale_that_cannot_write_a_path_is_named(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(GOOD.replace("runs/good", str(tmp_path / "läufe")), encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("submit", str(job), env={**os.environ, **ascii_only})
    assert done.returncode == 2
    assert done.stderr.startswith("error: this locale's encoding, ascii, does not have all characters")
    assert "hint: set LC_ALL=C.UTF-8" in done.stderr


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
