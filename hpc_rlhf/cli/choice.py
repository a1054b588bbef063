"""What was chosen where a spec says `auto`, why, and what else was considered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click

from hpc_rlhf.cli.table import echo_table, echo_words
from hpc_rlhf.launch.auto import Choice, told

# Others that a table shows: as fast as these, and the fastest that do not fit.
_SHOWN, _TOO_LARGE = 4, 2


def echo_choice(choice: Choice) -> None:
    """Print a choice in a line."""
    echo_words(f"{choice.stage}: {told(choice.fields)}, {choice.why}")


def echo_choices(choices: Sequence[Choice]) -> None:
    """Print choices with the best of what else was considered, and why."""
    rows = [row for choice in choices for row in _rows(choice)]
    if rows:
        click.echo()
        echo_table(("stage", "considered", "time", "     GiB", ""), rows)
    for choice in choices:
        echo_choice(choice)


def choice_dict(choice: Choice) -> dict[str, object]:
    return {
        "chosen": dict(choice.fields),
        "why": choice.why,
        "considered": [asdict(one) for one in choice.considered],
    }


def _rows(choice: Choice) -> list[tuple[str, ...]]:
    """The chosen combination and the best of the others; none where nothing was considered."""
    chosen = [one for one in choice.considered if one.fields == choice.fields]
    others = [one for one in choice.considered if one.fields != choice.fields]
    fitting = [one for one in others if one.fits][:_SHOWN]
    too_large = [one for one in others if not one.fits][:_TOO_LARGE]
    return [
        (
            "" if place else choice.stage,
            told(one.fields),
            f"x {one.seconds / chosen[0].seconds:.2f}",
            f"{one.held / 2**30:8.2f}",
            "" if place and one.fits else "too large" if place else "chosen",
        )
        for place, one in enumerate([*chosen, *fitting, *too_large])
    ]
