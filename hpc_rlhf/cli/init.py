"""hpc-rlhf init: write a commented job spec to start from."""

from __future__ import annotations

import re
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, writing
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.stages.recipes import DEPLOYMENTS, recipe_for
from hpc_rlhf.spec.starter import write_starter


@click.command(
    epilog=example("hpc-rlhf init --actor facebook/opt-1.3b --reward facebook/opt-350m --deployment single_gpu")
)
@click.option("--actor", required=True, metavar="MODEL", help="Hub id or folder of the model to train.")
@click.option(
    "--reward",
    metavar="MODEL",
    help="Hub id or folder of the model to make the reward model of.",
    show_default="the actor's",
)
@click.option("--deployment", required=True, type=click.Choice(DEPLOYMENTS), help="The machine to train on.")
@click.option("--name", help="Name of the run.", show_default="made from the actor's")
@click.option("--out", metavar="FILE", help="File to write, - for stdout.", show_default="NAME.yaml")
def command(actor: str, reward: str | None, deployment: str, name: str | None, out: str | None) -> None:
    """Write a commented job spec to start from.

    The batches are those that DeepSpeed-Chat published for the nearest model size; for OPT models the epochs and
    learning rates too, except those of adapters. For other models, these are from more recent sources.
    """
    for option, value in (("--actor", actor), ("--reward", reward)):
        if value is not None and not re.fullmatch("(~/|[./]*)[A-Za-z0-9][A-Za-z0-9./_-]*", value):
            raise HpcRlhfError(f"{value!r} is neither a hub id nor a plain path", where=option)
    name = re.sub("[^a-z0-9._-]+", "-", Path(actor).name.lower()) if name is None else name
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise HpcRlhfError(
            f"{name!r} is not a valid name: use letters, digits and . _ -, starting with a letter or digit",
            where="--name",
        )
    recipe = recipe_for(deployment, actor, reward or actor)
    file = f"{name}.yaml" if out is None else out
    shown = "FILE" if file == "-" else file
    text = write_starter(recipe, actor=actor, reward=reward or actor, name=name, file=shown)
    if file == "-":
        click.echo(text, nl=False)
        return
    with writing(Path(file)), Path(file).open("x", encoding="utf-8") as new:
        new.write(text)
    click.echo(f"wrote {file}; next: hpc-rlhf check {file}", err=True)
