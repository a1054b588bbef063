"""hpc-rlhf init: write a commented job spec to start from."""

from __future__ import annotations

import re
from pathlib import Path

import click

from hpc_rlhf.cli.options import example
from hpc_rlhf.cli.out_option import writing
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.recipes import DEPLOYMENTS, Recipe, billions_in, nearest


@click.command(
    epilog=example(
        "hpc-rlhf init --actor facebook/opt-1.3b --reward facebook/opt-350m --deployment single_gpu"
    )
)
@click.option(
    "--actor", required=True, metavar="MODEL", help="Hub id or folder of the model to make a chat model of."
)
@click.option("--reward", metavar="MODEL", help="The same for the reward model; the actor's when left out.")
@click.option("--deployment", required=True, type=click.Choice(DEPLOYMENTS), help="The machine to train on.")
@click.option("--name", help="Name of the run; made from the actor's when left out.")
@click.option("--out", metavar="FILE", help="Where to write; NAME.yaml when left out, - for stdout.")
def command(actor: str, reward: str | None, deployment: str, name: str | None, out: str | None) -> None:
    """Write a commented job spec to start from.

    Its numbers are those that DeepSpeed-Chat published for the nearest size of model.
    """
    from hpc_rlhf.spec.starter import write_starter

    for option, value in (("--actor", actor), ("--reward", reward)):
        if value is not None and not re.fullmatch("(~/|[./]*)[A-Za-z0-9][A-Za-z0-9./_-]*", value):
            raise HpcRlhfError(f"{value!r} is neither a hub id nor a plain path", where=option)
    name = re.sub("[^a-z0-9._-]+", "-", Path(actor).name.lower()) if name is None else name
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise HpcRlhfError(f"{name!r} is no name: it takes letters, digits and . _ -", where="--name")
    billions = billions_in(actor)
    recipe = nearest(deployment, billions or 1.3)
    file = f"{name}.yaml" if out is None else out
    text = write_starter(
        recipe,
        actor=actor,
        reward=reward or actor,
        name=name,
        title=f"{actor} as a chat model, on {recipe.machine}.",
        origin=_origin(recipe, billions),
        file="FILE" if out == "-" else file,
    )
    if out == "-":
        click.echo(text, nl=False)
        return
    with writing(Path(file)), Path(file).open("x", encoding="utf-8") as new:
        new.write(text)
    click.echo(f"wrote {file}; next: hpc-rlhf check {file}", err=True)


def _origin(recipe: Recipe, billions: float | None) -> str:
    origin = (
        f"The numbers are DeepSpeed-Chat's for {recipe.billions:g} billion parameters on {recipe.machine}."
    )
    if billions is None:
        return f"{origin} The model's name tells no size: see that they suit it."
    if not 1 / 1.6 <= billions / recipe.billions <= 1.6:
        return f"{origin}\n# They are not proven for {billions:g} billion: see that memory and learning rates suit it."
    return origin
