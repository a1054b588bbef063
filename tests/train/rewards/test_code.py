"""The code of responses is judged by tests, and cannot get out of its sandbox."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.train.rewards import code
from hpc_rlhf.train.rewards.text import Failure, Score, TextBatch
from hpc_rlhf.train.rewards.verifier import Verifier
from hpc_rlhf.train.rewards.workers import Pool
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled
from tests.train.rewards.sandboxes import APPTAINER, make_image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(APPTAINER is None, reason="no apptainer (scripts/install-apptainer.sh installs it on Debian)"),
]

Judge = Callable[[list[Any]], Any]
MEMORY = 256 * 2**20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    assert APPTAINER is not None
    patch = pytest.MonkeyPatch()
    patch.setenv("PATH", str(Path(APPTAINER).parent), prepend=os.pathsep)
    yield make_image(tmp_path_factory.mktemp("image") / "python")
    patch.undo()


@pytest.fixture(scope="module")
def judge(image: Path) -> Judge:
    """With time for all tests on a busy machine."""
    return code.make(str(image), seconds=30.0, memory=MEMORY, selected=True)


def test_the_score_is_the_share_of_the_tests_that_pass(image: Path) -> None:
    tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(1, 1) == 3"]
    says = (
        "First ```x```:\n```\nraise ValueError\n```\nBetter:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    )
    rows: list[tuple[Any, str]] = [
        (tests, says), (tests[0], says), (tests, "I cannot do that."), (None, says), ([], says), ([3], says),
    ]  # fmt: skip
    arguments = {"image": str(image), "seconds": 20.0, "memory": MEMORY, "selected": False}
    pool = Pool("hpc_rlhf.train.rewards.code:make", arguments, size=2, timeout=60)
    cells, responses = map(list, zip(*rows, strict=True))
    scores: list[Score] = Verifier("code", "tests", pool).judge(
        TextBatch([""] * len(rows), responses, [[]] * len(rows), {"tests": cells})
    )
    pool.close()
    assert scores[:4] == [pytest.approx(2 / 3), 1.0, 0.0, None]
    assert [score.why for score in scores[4:] if isinstance(score, Failure)] == [
        "needs tests as text or a list of texts, and got []",
        "needs tests as text or a list of texts, and got [3]",
    ]


def test_code_that_ends_before_its_tests_does_not_pass_them(judge: Judge) -> None:
    for ending in ("import os; os._exit(0)", "raise SystemExit(0)", "def f(:", "input()"):
        assert judge([["pass"], ending]) == [0.0, None]


def test_code_reaches_neither_network_nor_files_of_the_host(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    socket = "import os, socket; s = socket.socket(); s.settimeout(2)"
    open_ended = [
        "s.connect(('127.0.0.1', 22))", "s.connect(('192.0.2.1', 53))", "socket.getaddrinfo('example.com', 80)",
        f"open({str(tmp_path / 'secret')!r})", f"os.stat({str(Path(code.__file__))!r})",
        "open(os.path.expanduser('~/new'), 'w')", "open('/etc/new', 'w')", "os.environ['HPC_RLHF_TEST_SESSION']",
    ]  # fmt: skip
    refused = [f"try:\n    {line}\nexcept (OSError, KeyError): pass\nelse: raise ValueError" for line in open_ended]
    assert judge([[*refused, "open('/tmp/new', 'w').write('x')"], socket]) == [1.0, None]


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import os\nwhile True: os.fork()", "(started|used) more than .*"),
        ("held = []\nwhile True: held.append(b'x' * 10**6)", "used more than 256 MiB of memory"),
        ("n = 0\nwhile n := n + 1: open(f'/tmp/{n}', 'w').write('x' * 10**6)", "wrote more than 64 MiB"),
        ("n = 0\nwhile n := n + 1: open(f'/dev/shm/{n}', 'w').write('x' * 10**6)", "wrote more than 64 MiB"),
        ("import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)", "ended the sandbox"),
        ("import os\nopen(f'/proc/{os.getppid()}/fd/1', 'w').write('{\"passed\": 1, \"why\": null}\\n')", None),
    ],
)
def test_code_that_takes_too_much_is_contained(judge: Judge, program: str, why: str | None) -> None:
    score, remark = judge([["pass"], program])
    assert score == 0.0
    assert remark is None if why is None else re.fullmatch(why, remark)
    assert not running("python3 -I", isolated=True)


def test_code_that_takes_too_long_is_ended(image: Path) -> None:
    judge = code.make(str(image), seconds=3.0, memory=MEMORY, selected=True)
    program = "import os\nfor _ in range(3):\n    os.fork() or os.setsid()\nwhile True: pass"
    assert judge([["pass"], program]) == [0.0, "took longer than 3 s"]
    assert not running("python3 -I", isolated=True)


def test_a_stop_ends_the_sandbox(image: Path) -> None:
    stop = threading.Event()
    arguments = {"image": str(image), "seconds": 60.0, "memory": MEMORY, "selected": True}
    pool = Pool("hpc_rlhf.train.rewards.code:make", arguments, size=1, timeout=90, should_stop=stop.is_set)
    assert pool.map([["pass", ""]])[0].value == [1.0, None]
    threading.Timer(1.5, stop.set).start()
    with pytest.raises(WorkCancelled):
        pool.map([["pass", "while True: pass"]])
    pool.close()
    assert not running(str(image))


def test_without_a_sandbox_nothing_runs(image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(code.SandboxError, match="did not start"):
        code.make(str(tmp_path), seconds=5.0, memory=MEMORY, selected=True)
    # An Apptainer that isolates nothing.
    (tmp_path / "apptainer").write_text('#!/bin/sh\nwhile [ "$1" != python3 ]; do shift; done\nexec "$@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(code.SandboxError, match="has a sandbox that does not isolate: it shares the net namespace"):
        code.make(str(image), seconds=5.0, memory=MEMORY, selected=True)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(code.SandboxError, match="needs Apptainer, which is not on PATH"):
        code.make(str(image), seconds=5.0, memory=MEMORY, selected=True)


def running(text: str, isolated: bool = False) -> list[str]:
    """Commands that contain a text and are still running after some seconds; isolated: in another network namespace."""
    network = os.readlink("/proc/self/ns/net")

    def commands() -> list[str]:
        lines = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if not isolated or os.readlink(process / "ns/net") != network:
                    lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
        return [command for command in lines if text in command]

    deadline = time.monotonic() + 10
    while commands() and time.monotonic() < deadline:
        time.sleep(0.1)
    return commands()
