"""A conversation with one or several models, on a terminal or through pipes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf.observe.printable import printable

if TYPE_CHECKING:
    from hpc_rlhf.train.chat import ChatModel

HELP = (
    "/reset starts over; /save FILE writes the conversation to a new JSON file; /help lists these commands; "
    "/quit ends the conversation, as does Ctrl-D."
)
# Least columns of a terminal for each response; on a narrower terminal they follow each other.
COLUMN = 36
ROLES = {"human": "user", "assistant": "assistant"}


@dataclass
class Conversation:
    """A model and all that was said to it and by it.

    Attributes:
        turns: (role, text), with roles ``human`` and ``assistant``.
    """

    name: str
    model: ChatModel
    max_tokens: int
    temperature: float
    seed: int
    turns: list[tuple[str, str]] = field(default_factory=list)

    def respond(self, prompt: str) -> Generator[str, None, None]:
        """Stream the response. What was read of it becomes part of the conversation."""
        self.turns.append(("human", prompt))
        lost = self.model.forgotten(self.turns, self.max_tokens)
        if lost:
            click.echo(f"{self.name} no longer sees the oldest {lost} tokens of this conversation", err=True)
        streamed: list[str] = []
        try:
            for chunk in self.model.stream(self.turns.copy(), self.max_tokens, self.temperature, self.seed):
                streamed.append(chunk)
                # Without control characters, with which a model could drive the terminal.
                yield "".join(char for char in chunk if char.isprintable() or char in "\n\t")
        finally:
            self.turns.append(("assistant", "".join(streamed).strip()))

    def as_dict(self) -> dict[str, object]:
        return {"stage": self.name, "messages": [{"role": ROLES[role], "content": text} for role, text in self.turns]}


def converse(conversations: Sequence[Conversation]) -> None:
    """Respond to each line until the input ends."""
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
            click.echo(_execute(line, conversations), err=True)
        elif line:
            respond(conversations, line, stoppable=interactive)
    if interactive:
        click.echo(err=True)


def respond(conversations: Sequence[Conversation], prompt: str, stoppable: bool = False) -> None:
    """Print the responses as they stream. If ``stoppable``, Ctrl-C ends the response and not the program."""
    streams = [each.respond(prompt) for each in conversations]
    try:
        if len(conversations) == 1:
            _print(streams[0])
        elif sys.stdout.isatty() and shutil.get_terminal_size().columns >= COLUMN * len(conversations):
            _print_side_by_side([each.name for each in conversations], streams)
        else:
            for each, stream in zip(conversations, streams, strict=True):
                click.echo(f"{each.name}: ", nl=False)
                _print(stream)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        click.echo()
    finally:
        for stream in streams:
            stream.close()


def _execute(line: str, conversations: Sequence[Conversation]) -> str:
    """Execute a slash command and return its message."""
    command, _, rest = line.partition(" ")
    if command == "/help":
        return HELP
    if command == "/reset":
        for each in conversations:
            each.turns.clear()
        return "started over"
    if command == "/save" and rest.strip():
        path = Path(rest.strip()).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump([each.as_dict() for each in conversations], file, indent=1, ensure_ascii=False)
        except OSError as error:
            return f"not saved: {path}: {error.strerror}"
        return f"saved in {path}"
    return f"no such command: {line}. {HELP}"


def _print(chunks: Iterator[str]) -> None:
    for chunk in chunks:
        click.echo(printable(chunk), nl=False)
        sys.stdout.flush()
    click.echo()


def _print_side_by_side(names: Sequence[str], streams: Sequence[Iterator[str]]) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from hpc_rlhf.observe.terminal.tables import SafeConsole

    responses = [""] * len(names)

    def table() -> Table:
        columns = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for name in names:
            columns.add_column(name, ratio=1, overflow="fold")
        columns.add_row(*map(Text, responses))
        return columns

    with Live(table(), console=SafeConsole(), vertical_overflow="visible", refresh_per_second=12) as live:
        for chunks in zip_longest(*streams, fillvalue=""):
            responses = [text + chunk for text, chunk in zip(responses, chunks, strict=True)]
            live.update(table())
