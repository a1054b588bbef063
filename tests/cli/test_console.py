"""Tables on a terminal, in a pipe and without colour."""

from __future__ import annotations

import re

import pytest

from hpc_rlhf.cli.console import print_parts, print_table
from hpc_rlhf.observe.terminal.tables import styled

LONG = "a sentence that is longer than the terminal is wide, and is folded at words"


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_table_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("stage", "step", ""), [("sft", "7", LONG)], right=("step",))
    out = capsys.readouterr().out
    lines = re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()
    assert "\x1b[1m" in out
    assert max(map(len, lines)) <= 40
    assert lines[1].startswith("sft       7  a sentence")
    assert " ".join(" ".join(lines[1:]).split()) == f"sft 7 {LONG}"


def test_pipe_gets_plain_unfolded_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR")
    print_table(("stage", "step", ""), [("sft", "7", LONG)], right=("step",))
    assert capsys.readouterr().out == f"stage  step\nsft       7  {LONG}\n"


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_turns_colour_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    print_parts(lambda width, live, ascii_only: [styled("failed")])
    assert ("\x1b[31m" in capsys.readouterr().out) == (not no_color)
