"""hpc-rlhf compare: rank several runs by how they came out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hpc_rlhf.cli.options import example, json_option
from hpc_rlhf.cli.run_argument import find_runs
from hpc_rlhf.observe.compare import (
    EVALUATED,
    Compared,
    Comparison,
    OverSeeds,
    compare,
    compares_scores,
    over_seeds,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 100  # columns from which on there is room for more numbers
_MOST_NUMBERS = 4
_MOST_VALUES = 6
_LONGEST = 28


@click.command(
    epilog=example("hpc-rlhf compare my-sweep.yaml", "hpc-rlhf compare runs/one runs/other --by ppo.kl")
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--by", metavar="NUMBER", help="What to rank by; --json shows all there is.")
@json_option
def command(runs: tuple[str, ...], by: str | None, as_json: bool) -> None:
    """Rank runs by how they came out, beside the fields in which they differ.

    Each RUN is a run directory or a job file; that of a sweep stands for all its runs.

    They are ranked by the reward of their last model as evaluated, or where the runs have different reward models by how
    often its answers win, since each reward model has a scale of its own. Without evaluations what tells most of the training
    counts, such as ppo.reward: what was measured at its end, or the mean over the last tenth of the steps. Runs that differ in
    their seed only are also shown together.

    --json has what they were ranked `by`, how many reward models there are (`judges`), the list `runs`, the best first, and
    `over_seeds`. A run has its name and path, the `values` of the fields that differ, its state, and all its `numbers`, each
    with its value and the low and high end of its interval, which are null where there is none.
    """
    folders = list({run.path: run for argument in runs for run in find_runs(argument)}.values())
    comparison = compare(folders, by)
    together = over_seeds(comparison)
    if as_json:
        facts = {**asdict(comparison), "over_seeds": [asdict(group) for group in together]}
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    from hpc_rlhf.cli.console import print_parts

    print_parts(lambda width, live, plain: _parts(comparison, together, width))
    for note in _notes(comparison):
        click.echo(note, err=True)


def _parts(comparison: Comparison, together: Sequence[OverSeeds], width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    yield _table(comparison, width)
    if together:
        yield Text()
        yield _over_seeds_table(together, str(comparison.by))


def _table(comparison: Comparison, width: int) -> RenderableType:
    from hpc_rlhf.observe.terminal.board import grid, styled
    from hpc_rlhf.spec.sweep import short_names

    names = _numbers(comparison)[: _MOST_NUMBERS if width >= _WIDE else 2]
    paths = comparison.paths[:_MOST_VALUES]
    short = short_names(paths)
    unfinished = any(run.state != "done" for run in comparison.runs)
    table = grid()
    for header in ("", *names, *short.values(), *(["state"] if unfinished else [])):
        table.add_column(header, no_wrap=True)
    table.add_column("run", overflow="fold")
    for place, run in enumerate(comparison.runs, 1):
        cells = [_cell(run, name) for name in names]
        ranked = comparison.by in run.numbers
        states = [styled(run.state)] if unfinished else []
        values = [_shown(run.values.get(path)) for path in paths]
        table.add_row(str(place) if ranked else "-", *cells, *values, *states, run.name)
    return table


def _over_seeds_table(together: Sequence[OverSeeds], by: str) -> RenderableType:
    from hpc_rlhf.observe.format import number
    from hpc_rlhf.observe.terminal.board import grid
    from hpc_rlhf.spec.sweep import short_names

    paths = list(together[0].values)[:_MOST_VALUES]
    table = grid()
    for header in ("", f"mean {by}", "std", "seeds", *short_names(paths).values()):
        table.add_column(header, no_wrap=True)
    for place, group in enumerate(together, 1):
        values = [_shown(group.values[path]) for path in paths]
        table.add_row(str(place), number(group.mean), number(group.std), str(group.runs), *values)
    return table


def _numbers(comparison: Comparison) -> list[str]:
    """The numbers that the table shows, the one that it is ranked by first; then those that any run has been evaluated with, or
    else those of training."""
    known = dict.fromkeys(name for run in comparison.runs for name in run.numbers)
    evaluated = [name for name in EVALUATED if name in known]
    trained = [name for name in reversed(known) if name not in EVALUATED]
    first = [comparison.by] if comparison.by else []
    return [*first, *(name for name in (*evaluated, *trained) if name != comparison.by)]


def _cell(run: Compared, name: str) -> str:
    from hpc_rlhf.observe.evaluation import cell

    number = run.numbers.get(name)
    if number is None:
        return "-"
    return cell(name, number.value if number.low is None else asdict(number))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        value = " ".join(f"{key}={each}" for key, each in value.items() if each is not None)
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _notes(comparison: Comparison) -> Iterator[str]:
    if comparison.by is None:
        yield "no run has a number yet to rank it by"
    else:
        yield f"ranked by {comparison.by}"
    if compares_scores(comparison):
        yield (
            f"the runs have {comparison.judges} reward models, each with a scale of its own: rewards of different ones do "
            "not compare"
        )
    left_out = len(comparison.paths) - _MOST_VALUES
    if left_out > 0:
        yield f"they differ in {left_out} more fields: --json has them all"
