"""hpc-rlhf feedback: show, export and delete the votes on a run's models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, json_option, run_argument, write_out
from hpc_rlhf.cli.console import print_json, print_table
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.intervals import Interval
from hpc_rlhf.observe import feedback as results
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.run import acting, feedback
from hpc_rlhf.run.feedback import ANSWERS, Vote
from hpc_rlhf.run.format import ago

_LISTED, _WORDS = 20, 48  # votes in the list, and characters of a prompt


@click.command(
    epilog=example(
        "hpc-rlhf feedback my-job.yaml",
        "hpc-rlhf feedback my-job.yaml --kind pair --export pairs.jsonl",
        "hpc-rlhf feedback my-job.yaml --user eve --delete",
    )
)
@run_argument
@click.option("--kind", type=click.Choice(tuple(ANSWERS)), help="Only votes of this kind.")
@click.option("--model", help="Only votes on this model.")
@click.option("--vote", "choice", type=click.Choice([*ANSWERS["thumbs"], *ANSWERS["pair"]]), help="Only these votes.")
@click.option("--user", help="Only votes of this user; names are known where serve --record-user stored them.")
@click.option("--id", "ids", multiple=True, help="Only the vote with this id. Repeatable.")
@click.option(
    "--export",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write the votes to a .jsonl or .csv file, or as JSON lines to stdout (-).",
)
@click.option("--delete", is_flag=True, help="Delete the votes, for good; needs --id or --user.")
@json_option
def command(
    run: str, kind: str | None, model: str | None, choice: str | None, user: str | None, ids: tuple[str, ...],
    export: Path | None, delete: bool, as_json: bool,
) -> None:  # fmt: skip
    """Show the votes on the models of RUN, a run directory or job file, on the page of hpc-rlhf serve.

    For each pair of models that were compared, it shows the win rate with its 95 % interval (Wilson's); a vote for
    neither counts half. Then come the shares of thumbs up, and the latest votes.

    --json prints `pairs`, `thumbs`, all `votes`, and `damaged`, the number of lines that a crash cut short.
    """

    def chosen(vote: Vote) -> bool:
        return (
            kind in (None, vote.kind)
            and choice in (None, vote.vote)
            and user in (None, vote.user)
            and (not ids or vote.id in ids)
            and (model is None or model in [each.name for each in vote.models])
        )

    run_dir = find_run(run)
    if delete:
        if not ids and user is None:
            raise click.UsageError("--delete needs --id or --user.")
        acting.check_owner(run_dir)
        count = feedback.delete(run_dir.feedback, chosen)
        click.echo(f"deleted {count} vote{'s' * (count != 1)}", err=True)
        return
    votes, damaged = results.votes_of(run_dir, chosen)
    if export is not None:
        _export(votes, export)
    elif as_json:
        pairs, thumbs = results.pair_results(votes), results.thumbs_results(votes)
        print_json({
            "pairs": [asdict(result) for result in pairs],
            "thumbs": [asdict(result) for result in thumbs],
            "votes": [vote.model_dump(exclude_none=True) for vote in votes],
            "damaged": damaged,
        })  # fmt: skip
    else:
        _show(votes)
    if damaged and not as_json:
        click.echo(f"left out {damaged} damaged line{'s' * (damaged != 1)}", err=True)


def _export(votes: Sequence[Vote], out: Path) -> None:
    if out.suffix == ".csv":
        write_out(out, results.as_csv(votes))
    elif out.suffix == ".jsonl" or str(out) == "-":
        write_out(out, "".join(f"{vote.model_dump_json(exclude_none=True)}\n" for vote in votes))
    else:
        raise HpcRlhfError("exports are .jsonl or .csv files", where=str(out), hint="choose such a name with --export")


def _show(votes: Sequence[Vote]) -> None:
    if not votes:
        click.echo("no votes yet, or none that fit; people vote on the page of hpc-rlhf serve", err=True)
        return
    if pairs := results.pair_results(votes):
        counts = ("wins", "losses", "ties", "both bad")
        rows = [
            (
                *(one.model, one.against, *map(str, (one.wins, one.losses, one.ties, one.both_bad))),
                "-" if one.win_rate is None else _share(one.win_rate),
            )
            for one in pairs
        ]
        print_table(("model", "against", *counts, "win rate"), rows, right=counts)
        click.echo()
    if thumbs := results.thumbs_results(votes):
        ups = [(one.model, str(one.up), str(one.down), _share(one.liked)) for one in thumbs]
        print_table(("model", "up", "down", "liked"), ups, right=("up", "down"))
        click.echo()
    print_table(("when", "id", "models", "vote", "prompt"), map(_row, votes[-_LISTED:]))
    if len(votes) > _LISTED:
        click.echo(f"the latest {_LISTED} of {len(votes)} votes; --export has all", err=True)


def _row(vote: Vote) -> tuple[str, ...]:
    models, prompt = " | ".join(model.name for model in vote.models), " ".join(vote.messages[-1].content.split())
    shown = prompt if len(prompt) <= _WORDS else f"{prompt[: _WORDS - 1]}…"
    return ago(time.time() - vote.time), vote.id, models, vote.vote, shown


def _share(share: Interval) -> str:
    return f"{share.estimate:.1%} ({share.low:.1%} to {share.high:.1%})"
