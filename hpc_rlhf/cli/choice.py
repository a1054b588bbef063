"""What was chosen where a spec says `auto`, why, and what else was considered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click

from hpc_rlhf.cli.table import echo_table, echo_words
from hpc_rlhf.launch.auto import Candidate, Choice

# Others that a table shows: as fast as these, and the fastest that do not fit.
_SHOWN, _TOO_LARGE = 4, 2


def echo_choice(choice: Choice) -> None:
    """Print a choice in a line."""
    echo_words(f"{choice.stage}: {choice.chosen}, {choice.why}")


def echo_choices(choices: Sequence[Choice]) -> None:
    """Print choices with the best of what else was considered."""
    rows = []
    for choice in choices:
        for place, one in enumerate(_notable(choice)):
            rows.append(
                (
                    choice.stage if not place else "",
                    str(one),
                    f"x {one.seconds / choice.chosen.seconds:.2f}" if choice.considered else "",
                    f"{one.held / 2**30:8.2f}" if choice.considered else "",
                    "chosen" if one == choice.chosen else "" if one.fits else "too large",
                )
            )
    if rows:
        click.echo()
        echo_table(("stage", "considered", "time", "     GiB", ""), rows)
    for choice in choices:
        echo_choice(choice)


def choice_dict(choice: Choice) -> dict[str, object]:
    return {
        "chosen": dict(choice.chosen.fields),
        "why": choice.why,
        "considered": [asdict(one) for one in choice.considered],
    }


def _notable(choice: Choice) -> list[Candidate]:
    others = [one for one in choice.considered if one != choice.chosen]
    fitting = [one for one in others if one.fits][:_SHOWN]
    too_large = [one for one in others if not one.fits][:_TOO_LARGE]
    return [choice.chosen, *fitting, *too_large]
