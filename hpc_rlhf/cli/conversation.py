"""A conversation on a terminal or through pipes, with one model or with several side by side."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hpc_rlhf.train.chat import ChatModel

COMMANDS = {
    "/reset": "forgets what was said",
    "/save FILE": "writes it to a new JSON file",
    "/help": "lists these",
    "/quit": "ends, as Ctrl-D does",
}
HELP = "; ".join(f"{command} {does}" for command, does in COMMANDS.items()) + "."
# Columns of a terminal for each answer, at least; on a narrower one they follow each other.
COLUMN = 36
ROLES = {"human": "user", "assistant": "assistant"}


@dataclass
class Conversation:
    """A model by its name, and all that was said to it and by it.

    Attributes:
        turns: (role, text), with roles ``human`` and ``assistant``.
    """

    name: str
    model: ChatModel
    max_tokens: int
    temperature: float
    seed: int
    turns: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> Generator[str, None, None]:
        """Stream the answer. What was streamed is remembered, even if the rest is never asked for."""
        self.turns.append(("human", question))
        lost = self.model.forgotten(self.turns, self.max_tokens)
        if lost:
            click.echo(f"{self.name} no longer sees the oldest {lost} tokens of this conversation", err=True)
        said: list[str] = []
        try:
            for piece in self.model.stream(self.turns.copy(), self.max_tokens, self.temperature, self.seed):
                said.append(piece)
                yield _printable(piece)
        finally:
            self.turns.append(("assistant", "".join(said).strip()))

    def as_dict(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "messages": [{"role": ROLES[role], "content": text} for role, text in self.turns],
        }


def converse(talks: Sequence[Conversation]) -> None:
    """Answer line by line, until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history for input()

        click.echo(HELP, err=True)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line == "/quit":
            break
        if line.startswith("/"):
            click.echo(_obey(line, talks), err=True)
        elif line:
            answer(talks, line, stoppable=interactive)
    if interactive:
        click.echo(err=True)


def answer(talks: Sequence[Conversation], question: str, stoppable: bool = False) -> None:
    """Print the answers as they come. Ctrl-C in a conversation ends the answer, not the conversation."""
    streams = [talk.answer(question) for talk in talks]
    try:
        if len(talks) == 1:
            _print(streams[0])
        elif sys.stdout.isatty() and shutil.get_terminal_size().columns >= COLUMN * len(talks):
            _print_side_by_side([talk.name for talk in talks], streams)
        else:
            for talk, stream in zip(talks, streams, strict=True):
                click.echo(f"{talk.name}: ", nl=False)
                _print(stream)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        click.echo()
    finally:
        for stream in streams:
            stream.close()


def _obey(line: str, talks: Sequence[Conversation]) -> str:
    """What came of a command."""
    command, _, rest = line.partition(" ")
    if command == "/help":
        return HELP
    if command == "/reset":
        for talk in talks:
            talk.turns.clear()
        return "forgotten"
    if command == "/save" and rest.strip():
        path = Path(rest.strip()).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump([talk.as_dict() for talk in talks], file, indent=1, ensure_ascii=False)
        except OSError as error:
            return f"not saved: {path}: {error.strerror}"
        return f"saved in {path}"
    return f"no such command: {line}. {HELP}"


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


def _print_side_by_side(names: Sequence[str], streams: Sequence[Iterator[str]]) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    said = [""] * len(names)

    def table() -> Table:
        columns = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for name in names:
            columns.add_column(name, ratio=1, overflow="fold")
        columns.add_row(*map(Text, said))
        return columns

    with Live(table(), vertical_overflow="visible", refresh_per_second=12) as live:
        for pieces in zip_longest(*streams, fillvalue=""):
            said = [before + piece for before, piece in zip(said, pieces, strict=True)]
            live.update(table())


def _printable(text: str) -> str:
    """Whatever a model says, a terminal is not to act on it."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
