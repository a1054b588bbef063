"""What logs, ledgers and models say reaches the terminal as text, whatever control characters it has."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.live import Live
from rich.text import Text

from hpc_rlhf.cli import main
from hpc_rlhf.cli.console import print_json, print_table, print_wrapped
from hpc_rlhf.cli.conversation import _print
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.prepare import prepare
from hpc_rlhf.observe.printable import printable, printable_json
from hpc_rlhf.observe.terminal.progress import PlainProgress
from hpc_rlhf.observe.terminal.tables import SafeConsole
from hpc_rlhf.run.events import Ended, Failed, Started
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from tests.launch.specs import make_spec

# Clear the screen, set the title, answer as if typed, 8-bit CSI, reordered text.
HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x08\u202ee\x7f"
SAFE = r"a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x08\u202ee\x7f"


def test_controls_are_shown_and_text_is_kept() -> None:
    assert printable(HOSTILE) == SAFE
    assert printable("tab\tline\nü 模 😀 \u200f") == "tab\tline\nü 模 😀 \u200f"
    assert printable("10 %\r20 %\r\nend\r\n") == "10 %\n20 %\nend\n"
    facts = {"why": HOSTILE + "\r"}
    assert json.loads(printable_json(json.dumps(facts, ensure_ascii=False))) == facts


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    prepare(make_spec(run.path, sft={}), run)
    ledger = Ledger(run.ledger)
    ledger.append(Started("sft", attempt="7-0", job_id="7", host=HOSTILE))
    ledger.append(Failed("sft", attempt="7-0", message=HOSTILE, host=HOSTILE))
    ledger.append(Ended("sft", reason=f"failed {HOSTILE}", message=HOSTILE, node=HOSTILE))
    for name in ("7_0_log.out", "7_0_log.err", "7_batch.log"):
        (run.stage("sft").logs / name).write_text(f"{HOSTILE}\n")
    return run


@pytest.mark.parametrize("words", ["status", "status --json", "logs", "logs --json", "list", "compare"])
def test_no_verb_prints_controls(words: str, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *options = words.split()
    main([verb, str(run.path), *options])
    captured = capsys.readouterr()
    output = captured.out + captured.err
    assert output
    assert not set("\x1b\x07\x9b\x08\x7f\u202e") & set(output)
    if verb in ("status", "logs") and not options:
        assert r"a\x1b[2Jb" in output


def test_errors_tables_and_answers_are_printed_as_text(capsys: pytest.CaptureFixture[str], run: RunDir) -> None:
    print_table(("name",), [(HOSTILE,)])
    print_json({"name": HOSTILE})
    print_wrapped(HOSTILE)
    _print(iter(HOSTILE))
    PlainProgress(run).say(HOSTILE)
    assert main(["status", f"/{HOSTILE}"]) == 2
    captured = capsys.readouterr()
    assert captured.out.count(r"a\x1b[2Jb") == 2
    assert captured.err.count(r"a\x1b[2Jb") == 3
    assert not set("\x1b\x07\x9b\x08\x7f\u202e") & set(captured.out + captured.err)
    assert "\x1b" not in str(HpcRlhfError("x"))


def test_a_live_display_keeps_its_own_controls_and_no_others() -> None:
    file = StringIO()
    console = SafeConsole(file=file, force_terminal=True, width=100)
    with Live(Text(HOSTILE, style="red"), console=console, screen=True, auto_refresh=False):
        pass
    shown = file.getvalue()
    assert SAFE.replace(r"\x07", "").replace(r"\x08", "") in shown  # rich leaves these out
    assert "\x1b[?1049h" in shown  # the alternative screen
    assert "\x1b[31m" in shown  # its colours
    assert "\x1b[2Jb" not in shown
