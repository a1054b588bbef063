"""The command hpc-rlhf: finds the verb, loads only its module, and turns what goes wrong into one clear message."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

import click

from hpc_rlhf import __version__
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError, SpecError

# Each verb is a module of this package with a click command called `command`. It is imported only when
# called, so that `--help` and the quick verbs do not pay for the slow ones.
VERBS = {
    "init": "Write a commented job spec to start from.",
    "check": "Check job specs and list everything wrong in them.",
    "schema": "Print the JSON Schema of a job spec, for editors.",
    "doctor": "Check what a run needs, here and on the nodes.",
    "prefetch": "Bring models and data from the hub into the cache.",
    "plan": "Show the jobs that a spec makes.",
    "render": "Write the scripts and configs that would be submitted.",
    "submit": "Submit a spec's stages to Slurm.",
    "run": "Run a spec's stages on this machine, without Slurm.",
    "eval": "Compare a run's models on held-out data.",
    "compare": "Rank several runs by how they came out.",
    "status": "Show how a run is getting on.",
    "watch": "Show it on a terminal as it goes on.",
    "list": "Show your runs, each in a line.",
    "report": "Write what a run did into one HTML file.",
    "logs": "Print the log of a stage.",
    "cancel": "Cancel a run's jobs.",
    "heal": "Let a chain that broke go on.",
    "chat": "Talk to the finished model.",
    "serve": "Let programs talk to it, by OpenAI's protocol.",
}

# What a machine does to any program.
_NO_BUGS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})

INTERRUPTED = 128 + 2  # as a shell reports a process ended by SIGINT


class LazyGroup(click.Group):
    """A group that knows its verbs by name and loads one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in VERBS:
            from difflib import get_close_matches

            close = get_close_matches(cmd_name, VERBS)
            ctx.fail(f"No such command {cmd_name!r}." + (f" Did you mean {close[0]}?" if close else ""))
        command = importlib.import_module(f"hpc_rlhf.cli.{cmd_name}").command
        assert isinstance(command, click.Command), cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def group() -> None:
    """From one YAML file to a chat model by RLHF: SFT, reward model and PPO, on Slurm or on this machine."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    _open_closed_streams()
    try:
        # A file name that the terminal's encoding cannot show must not end a verb.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        code = group.main(args=args, prog_name="hpc-rlhf", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except HpcRlhfError as error:
        # A SpecError's lines stay as they are, `file:line:col: …`, for editors that jump to them.
        click.echo(str(error) if isinstance(error, SpecError) else f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # whoever read it has gone
        return RUN_FAILED
    except Exception as error:
        return _report_bug(error)


def _open_closed_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) empty ones, so that no file it opens is one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the process


def _drop_output() -> None:
    """Point stdout elsewhere, so that the interpreter's last flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_bug(error: Exception) -> int:
    if os.environ.get("HPC_RLHF_DEBUG") == "1":
        traceback.print_exception(error)
        return RUN_FAILED
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _NO_BUGS):
        place = "" if error.filename is None else f"{error.filename}: "
        click.echo(f"error: {place}{error.strerror}", err=True)
        if error.filename is None:
            _drop_output()  # what is left of it would not fit either
        return RUN_FAILED
    click.echo(
        f"error: this is a bug in hpc-rlhf ({type(error).__name__}: {error}); please report it with {_traceback(error)}",
        err=True,
    )
    return RUN_FAILED


def _traceback(error: Exception) -> str:
    """Where an error's traceback can be had."""
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="hpc-rlhf-bug-",
            suffix=".txt",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return "what HPC_RLHF_DEBUG=1 shows"
    return file.name
