"""Watch a run on a terminal: the board, refreshed from files and Slurm until a key is pressed."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from hpc_rlhf.observe.gather import RunPlan, SlurmWatch
from hpc_rlhf.observe.metrics import MetricsReader
from hpc_rlhf.observe.status import read_status
from hpc_rlhf.observe.terminal.board import Board
from hpc_rlhf.run import acting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import kind_of

_EVERY = 2.0  # seconds between two reads of the files


class LiveBoard:
    """The board of a run, read again each time that it is drawn."""

    def __init__(self, run: RunDir, console: Console) -> None:
        self._run, self._console = run, console
        self._name = RunPlan.read(run).name
        self._readers: dict[str, MetricsReader] = {}
        self._values: dict[tuple[str, str], list[float]] = {}
        self._slurm = SlurmWatch(acting.other_owner(run))

    def draw(self) -> Group:
        """The parts of the display, from top to bottom."""
        stages = read_status(self._run, self._slurm.query)
        for stage in stages:
            self._read(stage.stage)
        board = Board(self._console.width, live=True, ascii_only=not self._console.encoding.startswith("utf"))
        head = Text(self._name, style="bold").append(f"  {self._run.path}", style="not bold dim")
        parts: list[RenderableType] = [head, Text(), board.table(stages)]
        for part in (board.curves(self._values), board.notes(stages)):
            parts += [] if part is None else [Text(), part]
        return Group(*parts, Text(), Text(f"{time.strftime('%H:%M:%S')}  press q to quit", style="dim"))

    def _read(self, stage: str) -> None:
        reader = self._readers.setdefault(stage, MetricsReader(self._run.stage(stage).metrics, stage))
        rows, evaluations, rewritten = reader.read_new()
        kind = kind_of(stage)
        curves = [(name, name, rows) for name in kind.progress]
        curves += [(name, f"held-out {name}", evaluations) for name in kind.held_out[:1]]
        for name, label, new in curves:
            values = self._values.setdefault((stage, label), [])
            if rewritten:
                values.clear()
            values += [value for row in new if (value := row.values.get(name)) is not None]


def watch(run: RunDir, console: Console) -> None:
    """Show a run on a terminal until q or Ctrl-C is pressed.

    Raises:
        HpcRlhfError: the plan cannot be read.
    """
    board = LiveBoard(run, console)
    with (
        _keys() as quits,  # first, because drawing may wait for Slurm
        Live(board.draw(), console=console, screen=True, auto_refresh=False) as live,
        suppress(KeyboardInterrupt),
    ):
        while not quits(_EVERY):
            live.update(board.draw(), refresh=True)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Read keys unbuffered and without echo, and restore the terminal afterwards.

    Yields a function that waits some seconds, or until the display has to be redrawn for another reason. It returns
    whether the user quits.
    """
    stdin = sys.stdin.fileno()
    resize_reader, resize_writer = os.pipe()

    def resized(number: int, frame: FrameType | None) -> None:
        os.write(resize_writer, b".")

    def quits(seconds: float) -> bool:
        ready, _, _ = select.select([stdin, resize_reader], [], [], seconds)
        if resize_reader in ready:
            os.read(resize_reader, 1024)
        if stdin not in ready:
            return False
        pressed = os.read(stdin, 1024)
        return not pressed or b"q" in pressed.lower()

    before = termios.tcgetattr(stdin)
    handler = signal.signal(signal.SIGWINCH, resized)
    tty.setcbreak(stdin)
    try:
        yield quits
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)
        os.close(resize_reader)
        os.close(resize_writer)
