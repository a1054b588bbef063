"""The ledger keeps every line intact, with several writers and after interrupted writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hpc_rlhf.run.events import Failed, Finished, Started, Submitted, Submitting
from hpc_rlhf.run.ledger import Ledger

WRITER = """
import sys
from pathlib import Path
from hpc_rlhf.run.events import Failed
from hpc_rlhf.run.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(40):
    ledger.append(Failed("sft", attempt=sys.argv[2], exit_code=number, message=sys.argv[2] * 3000))
"""


def test_events_come_back_as_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    assert list(ledger.events()) == []
    ledger.append(Submitted("sft", job_id="7"))
    ledger.append(Submitted("ppo", job_id="8"))
    ledger.append(Finished("sft", step=3))
    assert [(e.name, e.stage) for e in ledger.events()] == [
        ("submitted", "sft"), ("submitted", "ppo"), ("finished", "sft"),
    ]  # fmt: skip
    assert [event.name for event in ledger.events("sft")] == ["submitted", "finished"]
    last = ledger.last(Submitted)
    assert last is not None
    assert last.job_id == "8"
    assert ledger.last(Submitted, "reward") is None
    assert ledger.path.stat().st_mode & 0o027 == 0


def test_a_message_of_any_text_stays_one_event(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    # Unicode line ends, and a byte of a file name that is not UTF-8.
    message = "a\nb\r\x85c\u2028d\u2029e\x0b\x0c\x1c \udcff €"
    ledger.append(Failed("sft", message=message))
    ledger.append(Started("sft"))
    failed, started = ledger.events()
    assert isinstance(failed, Failed)
    assert failed.message == message
    assert isinstance(started, Started)


def test_a_torn_last_line_is_skipped_without_losing_the_next_event(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(Submitting("sft", token="a"))
    whole = ledger.path.read_bytes()
    for length in range(1, len(whole)):
        ledger.path.write_bytes(whole + whole[:length])
        assert next(ledger.events()).name == "submitting"
        ledger.append(Submitted("sft", job_id="9"))
        last = ledger.last(Submitted)
        assert last is not None, f"the event after {length} torn bytes is lost"
        assert last.job_id == "9"


def test_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    events = list(Ledger(path).events())
    assert len(events) == 120
    for name in "abc":
        mine = [event for event in events if isinstance(event, Failed) and event.attempt == name]
        assert [event.exit_code for event in mine] == list(range(40))
        assert all(event.message == name * 3000 for event in mine)
