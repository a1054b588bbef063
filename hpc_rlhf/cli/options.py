"""Options that several verbs share."""

from __future__ import annotations

import click

set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a field of the spec, such as stages.ppo.epochs=2; may be given several times.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def example(*commands: str) -> str:
    """The end of a verb's help: commands that work."""
    return "\n".join(
        ("\b", "Example:" if len(commands) == 1 else "Examples:", *(f"  {line}" for line in commands))
    )
