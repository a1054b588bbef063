"""The hpc-rlhf command: imports only the module of the verb and turns every error into one clear message."""

# ruff: noqa: E402

from __future__ import annotations

from hpc_rlhf import safe_path

safe_path.leave_working_directory()  # before other modules are looked for there

import errno
import importlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem

from hpc_rlhf import __version__
from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError, SpecError
from hpc_rlhf.observe.printable import printable

# Each verb is a module of this package with a click command named `command`. It is imported only when called, so that
# `--help` and the fast verbs do not pay for the slow ones.
VERBS = {
    "init": "Write a commented job spec to start from.",
    "check": "Check job specs and list every error.",
    "data": "Show what a spec's data sources yield.",
    "schema": "Print the JSON Schema of a job spec, for editors.",
    "doctor": "Check that this machine and the cluster can run a spec.",
    "prefetch": "Download a spec's models and data sets into the hub cache.",
    "plan": "Show a spec's jobs, with memory and time estimates.",
    "render": "Write the scripts and configs without submitting them.",
    "submit": "Submit a spec's stages to Slurm.",
    "run": "Run a spec's stages on this machine, without Slurm.",
    "eval": "Evaluate a run's models on held-out data.",
    "compare": "Rank runs by their results.",
    "status": "Show a run's progress.",
    "watch": "Show a run's progress live.",
    "list": "List your runs.",
    "dashboard": "Show all runs below a folder on a live page.",
    "report": "Write a run's HTML report.",
    "logs": "Print a stage's log.",
    "cancel": "Cancel a run's jobs.",
    "heal": "Restart the failed stages of a run.",
    "relocate": "Adopt a run directory that was moved or copied.",
    "chat": "Chat with a trained model.",
    "serve": "Serve a trained model: a page to try it, and an OpenAI-compatible API.",
    "feedback": "Show, export and delete the votes on a run's models.",
    "next": "Write the spec of a run's next round, which learns from its votes.",
    "export": "Write a trained model as a GGUF file for llama.cpp.",
    "push": "Upload a trained model to the Hugging Face hub.",
    "version": "Print the versions of hpc-rlhf and of what it uses.",
}

# Errors of the machine, which are no bugs of ours.
_MACHINE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})

INTERRUPTED = 128 + 2  # the exit code that a shell reports after SIGINT


class LazyGroup(click.Group):
    """A click group that imports a verb only when it is called."""

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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        verbs = [CompletionItem(name, help=text) for name, text in VERBS.items() if name.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def group() -> None:
    """Train a chat model by RLHF from one YAML file, on Slurm or on this machine."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    _open_closed_streams()
    safe_path.protect(os.environ)
    try:
        # A file name that the terminal's encoding cannot show must not crash a verb.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        code = group.main(args=args, prog_name="hpc-rlhf", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except HpcRlhfError as error:
        # Lines of a SpecError stay `file:line:col: …`, so that editors can jump to them.
        _print_error(str(error) if isinstance(error, SpecError) else f"error: {error}")
        return error.exit_code
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        _print_error(text.getvalue().rstrip())
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()  # the reader has gone
        return RUN_FAILED
    except Exception as error:
        return _report_bug(error)


def _print_error(text: str) -> None:
    """Print an error to stderr, in colour on a terminal."""
    from hpc_rlhf.cli.colours import coloured

    click.echo(coloured(printable(text), sys.stderr), err=True)


def _open_closed_streams() -> None:
    """Open /dev/null for closed standard streams (`>&-`), so that no file takes their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the process ends


def _discard_output() -> None:
    """Point stdout at /dev/null, so that the interpreter's final flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_bug(error: Exception) -> int:
    if os.environ.get("HPC_RLHF_DEBUG") == "1":
        traceback.print_exception(error)
        return RUN_FAILED
    if isinstance(error, UnicodeError) and sys.getfilesystemencoding() != "utf-8":
        _print_error(
            f"error: this locale's encoding, {sys.getfilesystemencoding()}, does not have all characters of a path or "
            "text\n  hint: set LC_ALL=C.UTF-8"
        )
        return INPUT_WRONG
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _MACHINE_ERRORS):
        place = "" if error.filename is None else f"{error.filename}: "
        _print_error(f"error: {place}{error.strerror}")
        if error.filename is None:
            _discard_output()  # flushing the rest would fail too
        return RUN_FAILED
    what = f"{type(error).__name__}: {error}"
    _print_error(f"error: this is a bug in hpc-rlhf ({what}); please report it with {_traceback(error)}")
    return RUN_FAILED


def _traceback(error: Exception) -> str:
    """Write an error's traceback to a file and return its name, or else how to get the traceback."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="hpc-rlhf-bug-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return "the traceback that HPC_RLHF_DEBUG=1 prints"
    return file.name
