"""Watch a run on a terminal: the board redrawn in place as files and Slurm tell more, until a key ends it."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from hpc_rlhf.observe.gather import RunPlan, SlurmReply, query_slurm
from hpc_rlhf.observe.metrics import MetricsReader
from hpc_rlhf.observe.status import read_status
from hpc_rlhf.observe.terminal.board import Board, telling
from hpc_rlhf.run.layout import RunDir

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_EVERY = 2.0  # seconds between two looks at the files
_SLURM_EVERY = 15.0  # and between two questions to Slurm, which many others ask too


class Watching:
    """What is to be seen of a run, looked up again as often as it is drawn."""

    def __init__(self, run: RunDir) -> None:
        """Raises HpcRlhfError: the plan cannot be read."""
        self._run = run
        self._name = RunPlan.read(run).name
        self._readers: dict[str, MetricsReader] = {}
        self._values: dict[tuple[str, str], list[float]] = {}
        self._queried = -math.inf
        self._jobs: frozenset[str] = frozenset()
        self._reply = SlurmReply()

    def draw(self, width: int, plain: bool = False) -> list[RenderableType]:
        """The picture as it is now, from top to bottom."""
        from rich.text import Text

        stages = read_status(self._run, self._query)
        for stage in stages:
            self._read(stage.stage)
        board = Board(width, live=True, plain=plain)
        head = Text(f"{self._name}", style="bold").append(f"  {self._run.path}", style="not bold dim")
        parts: list[RenderableType] = [head, Text(), board.table(stages)]
        for part in (board.curves(self._values), board.notes(stages)):
            parts += [] if part is None else [Text(), part]
        return [*parts, Text(), Text(f"{time.strftime('%H:%M:%S')}  q ends", style="dim")]

    def _query(self, job_ids: Sequence[str]) -> SlurmReply:
        if time.monotonic() - self._queried > _SLURM_EVERY or not self._jobs.issuperset(job_ids):
            self._reply = query_slurm(job_ids)
            self._queried, self._jobs = time.monotonic(), frozenset(job_ids)
        return self._reply

    def _read(self, stage: str) -> None:
        reader = self._readers.setdefault(stage, MetricsReader(self._run.stage(stage).metrics, stage))
        rows, anew = reader.news()
        for name in telling(stage):
            values = self._values.setdefault((stage, name), [])
            if anew:
                values.clear()
            values += [float(row[name]) for row in rows if row.get(name) is not None]


def watch(run: RunDir, console: Console) -> None:
    """Draw a run on a terminal until q or Ctrl-C is pressed.

    Raises:
        HpcRlhfError: the plan cannot be read.
    """
    from rich.console import Group
    from rich.live import Live

    watching = Watching(run)
    plain = not console.encoding.startswith("utf")

    def picture() -> Group:
        return Group(*watching.draw(console.width, plain))

    with _keys() as keys, Live(picture(), console=console, screen=True, auto_refresh=False) as live:
        try:
            while not keys.ended(_EVERY):
                live.update(picture(), refresh=True)
        except KeyboardInterrupt:
            pass


class _Keys:
    """What is pressed, and that the window changed its size."""

    def __init__(self, stdin: int, resized: int) -> None:
        self._stdin, self._resized = stdin, resized

    def ended(self, seconds: float) -> bool:
        """Wait, until the picture is to be drawn anew; whether it is to end instead."""
        ready, _, _ = select.select([self._stdin, self._resized], [], [], seconds)
        if self._resized in ready:
            os.read(self._resized, 1024)
        if self._stdin not in ready:
            return False
        pressed = os.read(self._stdin, 1024)
        return not pressed or b"q" in pressed.lower()


@contextmanager
def _keys() -> Iterator[_Keys]:
    """Keys as they are pressed, unseen; the terminal as it was afterwards."""
    stdin = sys.stdin.fileno()
    told, tell = os.pipe()

    def resized(number: int, frame: FrameType | None) -> None:
        os.write(tell, b".")

    before: list[Any] = termios.tcgetattr(stdin)
    handler = signal.signal(signal.SIGWINCH, resized)
    tty.setcbreak(stdin)
    try:
        yield _Keys(stdin, told)
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)
        os.close(told)
        os.close(tell)
