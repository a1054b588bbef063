"""Arguments and options that several verbs share."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.run.files import write_atomically

set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a field of the spec, such as stages.ppo.epochs=2. Repeatable.",
)
run_argument = click.argument("run", shell_complete=lambda *_: [CompletionItem("", type="file")])
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
engine_option = click.option(
    "--engine",
    type=click.Choice(("in_process", "vllm")),
    help="What generates the responses.",
    show_default="vllm if a stage of a run of yours uses it",
)


def example(*commands: str) -> str:
    """The epilog of a verb's help: commands that work."""
    title = "Example:" if len(commands) == 1 else "Examples:"
    return "\n".join(("\b", title, *(f"  {line}" for line in commands)))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a failed write to the user's --out into an HpcRlhfError."""
    try:
        yield
    except FileExistsError as error:
        raise HpcRlhfError(
            "the file already exists", where=str(error.filename), hint="choose another with --out, or remove it"
        ) from error
    except OSError as error:
        raise HpcRlhfError(f"cannot write: {error.strerror}", where=str(error.filename or out)) from error


def print_overrides(file: Path) -> None:
    """Print, on stderr, the files that a loaded job file extends and the templates beside it."""
    from hpc_rlhf.launch.inputs import overrides

    for path, what in overrides(file).items():
        click.echo(printable(f"{path}: {what}"), err=True)


def write_out(out: Path, text: str) -> None:
    """Write a text to the user's --out, and print its path; to stdout if that is `-`.

    Raises:
        HpcRlhfError: the file cannot be written.
    """
    if str(out) == "-":
        click.echo(text, nl=False)
        return
    with writing(out):
        if out.exists() and not out.is_file():  # such as a pipe, which must not be replaced by a file
            out.write_text(text, encoding="utf-8")
        else:
            write_atomically(out, text)
    click.echo(out)


def write_new(text: str, file: str, verb: str) -> None:
    """Write a spec to a new file, or to stdout for `-`, and name the verb that comes next."""
    if file == "-":
        click.echo(text, nl=False)
        return
    with writing(Path(file)), Path(file).open("x", encoding="utf-8") as new:
        new.write(text)
    click.echo(f"wrote {file}; next: hpc-rlhf {verb} {shlex.quote(file)}", err=True)
