"""Verbs for writing a job spec: init, check, schema."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example, json_option, set_option, writing
from hpc_rlhf.cli.console import print_wrapped
from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError, Problem, SpecError
from hpc_rlhf.spec.recipes import DEPLOYMENTS, billions_in, nearest, write_starter


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
def init_command(actor: str, reward: str | None, deployment: str, name: str | None, out: str | None) -> None:
    """Write a commented job spec to start from.

    Its hyperparameters are those that DeepSpeed-Chat published for the nearest model size.
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
    recipe = nearest(deployment, billions_in(actor) or 1.3)
    text = write_starter(recipe, actor=actor, reward=reward or actor, name=name)
    if out == "-":
        click.echo(text, nl=False)
        return
    file = f"{name}.yaml" if out is None else out
    with writing(Path(file)), Path(file).open("x", encoding="utf-8") as new:
        new.write(text)
    click.echo(f"wrote {file}; next: hpc-rlhf check {file}", err=True)


@click.command(epilog=example("hpc-rlhf check my-job.yaml --set slurm.nodes=2"))
@click.argument("files", nargs=-1, required=True)
@set_option
@json_option
@click.pass_context
def check_command(ctx: click.Context, files: tuple[str, ...], sets: tuple[str, ...], as_json: bool) -> None:
    """Check job specs and list every error.

    Each error is one line, FILE:LINE:COLUMN: FIELD: ERROR (HINT). The exit code is 2 if there are any. All
    runs of a sweep are checked.
    """
    checked = {file: _check(file, sets) for file in files}
    if as_json:
        facts = {file: [asdict(problem) for problem in problems] for file, (problems, _) in checked.items()}
        click.echo(json.dumps(facts, indent=2))
    else:
        for file, (problems, verdict) in checked.items():
            for line in map(str, problems) if problems else [f"{file}: {verdict}"]:
                print_wrapped(line, err=False)
    bad = sum(1 for problems, _ in checked.values() if problems)
    if bad:
        click.echo(f"{bad} of {len(checked)} spec{'s' * (len(checked) > 1)} cannot run", err=True)
        ctx.exit(INPUT_WRONG)


def _check(file: str, sets: tuple[str, ...]) -> tuple[tuple[Problem, ...], str]:
    """The errors of a spec, and the verdict if there are none."""
    from hpc_rlhf.spec.sweep import Sweep, load_any, specs_of

    try:
        spec = load_any(file, sets)
        if any(one.autos for one in specs_of(spec)):
            from hpc_rlhf.launch.auto import load  # estimates are slow to import

            spec = load(file, sets)
    except SpecError as error:
        return error.problems, ""
    return (), f"ok, {spec.summary}" if isinstance(spec, Sweep) else "ok"


@click.command(epilog=example("hpc-rlhf schema > hpc-rlhf.schema.json"))
def schema_command() -> None:
    """Print the JSON Schema of a job spec, for editors.

    Save it and put `# yaml-language-server: $schema=PATH` at the top of a spec. An editor with the YAML
    language server then completes fields, shows their descriptions and marks errors.
    """
    from hpc_rlhf.spec.job import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
