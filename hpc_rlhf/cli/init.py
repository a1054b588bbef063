"""hpc-rlhf init: write a commented job spec to start from."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from hpc_rlhf.cli.arguments import example, write_new
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.stages import GRPO, PPO
from hpc_rlhf.spec.stages.recipes import DEPLOYMENTS, grpo_recipe, recipe_for
from hpc_rlhf.spec.starter import write_starter

_PACKAGE = Path(__file__).parents[1]


@click.command(
    epilog=example(
        "hpc-rlhf init --actor facebook/opt-1.3b --reward facebook/opt-350m --deployment single_gpu",
        "hpc-rlhf init --algorithm grpo --actor Qwen/Qwen3-8B --deployment single_node",
        "hpc-rlhf init --demo",
        "hpc-rlhf init --demo --algorithm grpo",
    )
)
@click.option("--actor", metavar="MODEL", help="Hub id, or folder such as ./my-model, of the model to train.")
@click.option(
    "--reward",
    metavar="MODEL",
    help="Hub id, or folder such as ./my-model, of the model to make the reward model of.",
    show_default="the actor's",
)
@click.option("--deployment", type=click.Choice(DEPLOYMENTS), help="The machine to train on.")
@click.option(
    "--algorithm",
    type=click.Choice([PPO.name, GRPO.name]),
    default=PPO.name,
    show_default=True,
    help="How the actor learns: PPO from a reward model, or GRPO from answers that can be verified.",
)
@click.option("--demo", is_flag=True, help="Write a demo's spec, which trains a tiny model on two CPU cores.")
@click.option("--name", help="Name of the run.", show_default="made from the actor's")
@click.option("--out", metavar="FILE", help="File to write, - for stdout.", show_default="NAME.yaml")
def command(
    actor: str | None, reward: str | None, deployment: str | None, algorithm: str, demo: bool, name: str | None,
    out: str | None,
) -> None:  # fmt: skip
    """Write a commented job spec to start from. On a terminal, init asks for --actor and --deployment.

    The batches of PPO are those that DeepSpeed-Chat published for the nearest model size; for OPT models the epochs and
    learning rates too, except those of adapters. For other models, these are from more recent sources. The settings of
    GRPO are those of verl's examples for GSM8K.
    """
    if demo:
        if actor or reward or deployment or name:
            raise click.UsageError("--demo cannot be used with other options than --algorithm and --out.")
        write_new(_demo("tiny-grpo.yaml" if algorithm == GRPO.name else "tiny.yaml"), out or "demo.yaml", "run")
        return
    verified = algorithm == GRPO.name
    if verified and reward is not None:
        raise click.UsageError("--reward is for --algorithm ppo; the rewards of GRPO are in its spec.")
    if actor is None:
        actor = _ask("--actor", "Model to train (hub id, or folder such as ./my-model)")
        if not verified:
            reward = reward or _ask("--reward", "Model to make the reward model of", default=actor)
    if deployment is None:
        deployment = _ask("--deployment", "Machine to train on", type=click.Choice(DEPLOYMENTS))
    for option, value in (("--actor", actor), ("--reward", reward)):
        if value is not None and not re.fullmatch("(~/|[./]*)[A-Za-z0-9][A-Za-z0-9./_-]*", value):
            raise HpcRlhfError(f"{value!r} is neither a hub id nor a plain path", where=option)
    name = re.sub("[^a-z0-9._-]+", "-", Path(actor).name.lower()) if name is None else name
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise HpcRlhfError(
            f"{name!r} is not a valid name: use letters, digits and . _ -, starting with a letter or digit",
            where="--name",
        )
    if verified:
        recipe = grpo_recipe(deployment)
    else:
        reward = reward or actor
        recipe = recipe_for(deployment, actor, reward)
    file = f"{name}.yaml" if out is None else out
    shown = "FILE" if file == "-" else file
    write_new(write_starter(recipe, actor=actor, reward=reward, name=name, file=shown), file, "check")


def _ask(option: str, question: str, **how: Any) -> str:
    """The user's answer.

    Raises:
        click.UsageError: there is no terminal to ask on.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError(f"Missing option '{option}'.")
    return str(click.prompt(question, err=True, **how))


def _demo(file: str) -> str:
    """A demo's spec. A wheel carries it inside the package; a checkout has it beside it."""
    folders = (_PACKAGE / "_jobs", _PACKAGE.parent / "jobs")
    return next(folder / file for folder in folders if folder.exists()).read_text(encoding="utf-8")
