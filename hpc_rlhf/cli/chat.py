"""hpc-rlhf chat: talk to the model that a run has made."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_rlhf import manifest
from hpc_rlhf.cli.options import example
from hpc_rlhf.cli.run_argument import find_run
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.rundir import RunDir

if TYPE_CHECKING:
    from hpc_rlhf.train.chat import ChatModel

CHAT_STAGES = ("dpo", "ppo", "sft")  # the latest first
HELP = "/reset forgets the conversation, /quit ends it."


def _finite(context: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.", context, option)
    return value


@click.command(
    "chat", epilog=f"In a conversation: {HELP}\n\n{example('hpc-rlhf chat my-job.yaml --stage sft')}"
)
@click.argument("run", metavar="RUN")
@click.option(
    "--stage", type=click.Choice(CHAT_STAGES), help="Whose model; the latest finished one by default."
)
@click.option("--prompt", metavar="TEXT", help="Answer this once, print the answer alone, and end.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    callback=_finite,
    default=0.7,
    show_default=True,
    help="0 is not random.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def command(
    run: str, stage: str | None, prompt: str | None, max_tokens: int, temperature: float, seed: int
) -> None:
    """Talk to the finished model of RUN, a run directory or job file."""
    folder = finished_model(find_run(run), stage)
    if sys.stderr.isatty():
        click.echo(f"loading {folder} …", err=True)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from hpc_rlhf.train.chat import ChatModel

    talk = Conversation(ChatModel(folder), max_tokens, temperature, seed)
    if prompt is not None:
        _print_answer(talk.answer(prompt))
    else:
        _converse(talk)


def finished_model(run: RunDir, stage: str | None) -> Path:
    """The folder of a stage's model, or of the latest finished stage's.

    Raises:
        HpcRlhfError: it is not finished, or not part of the run.
    """
    from hpc_rlhf.spec.load import read_spec

    planned = [name for name in CHAT_STAGES if name in read_spec(run.job_yaml).stage_names]
    if stage is not None and stage not in planned:
        raise HpcRlhfError(f"this run has no stage {stage}", where=str(run.path))
    wanted = planned if stage is None else [stage]
    for name in wanted:
        if manifest.defect(run.stage(name).model, deep=False) is None:
            return run.stage(name).model
    if not wanted:
        raise HpcRlhfError(
            "this run makes no chat model: it has none of sft, ppo and dpo", where=str(run.path)
        )
    raise HpcRlhfError(
        f"there is no model to talk to yet: {' and '.join(wanted)} "
        + ("is not finished" if len(wanted) == 1 else "are not finished"),
        where=str(run.path),
        hint=f"see how it is getting on: hpc-rlhf status {run.path}",
        exit_code=RUN_FAILED,
    )


@dataclass
class Conversation:
    """A model, and all that was said."""

    model: ChatModel
    max_tokens: int
    temperature: float
    seed: int
    turns: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> Iterator[str]:
        """Stream the answer. What was streamed is remembered, even if the rest is never asked for."""
        self.turns.append(("human", question))
        said: list[str] = []
        try:
            for piece in self.model.stream(self.turns.copy(), self.max_tokens, self.temperature, self.seed):
                said.append(piece)
                yield piece
        finally:
            self.turns.append(("assistant", "".join(said).strip()))


def _converse(talk: Conversation) -> None:
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
        if line == "/reset":
            talk.turns.clear()
            click.echo("forgotten", err=True)
        elif line.startswith("/"):
            click.echo(f"no such command: {line}. {HELP}", err=True)
        elif line:
            _print_answer(talk.answer(line), stoppable=interactive)
    if interactive:
        click.echo(err=True)


def _print_answer(pieces: Iterator[str], stoppable: bool = False) -> None:
    """Print an answer as it comes; Ctrl-C in a conversation ends the answer, not the conversation."""
    try:
        for piece in pieces:
            # Whatever a model says, a terminal is not to act on it.
            click.echo("".join(char for char in piece if char.isprintable() or char in "\n\t"), nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not stoppable:
            raise
    click.echo()
