"""hpc-rlhf chat: chat with a trained model."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import engine_option, example, run_argument
from hpc_rlhf.cli.console import print_json
from hpc_rlhf.cli.conversation import HELP, Conversation, converse, respond
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.models import finished_model
from hpc_rlhf.run import acting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec import rollout_checks
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.spec.stages import POLICIES


def _finite(context: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.", context, option)
    return value


@click.command(
    epilog=f"Commands in a conversation: {HELP}\n\n"
    + example("hpc-rlhf chat my-job.yaml", "hpc-rlhf chat my-job.yaml --compare sft ppo --prompt Hello")
)
@run_argument
@click.option(
    "--stage",
    type=click.Choice(tuple(POLICIES)),
    help="Model to use; ema is the moving average of PPO's weights.",
    show_default="the latest finished",
)
@click.option("--compare", nargs=2, type=click.Choice(tuple(POLICIES)), help="Two models to show side by side.")
@click.option("--prompt", metavar="TEXT", help="Print the response to this prompt and exit; - reads it from stdin.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest response.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    callback=_finite,
    default=0.7,
    show_default=True,
    help="Sampling temperature; 0 is greedy.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Sampling seed.")
@engine_option
@click.option("--json", "as_json", is_flag=True, help="With --prompt: print JSON, one conversation per model.")
def command(
    run: str, stage: str | None, compare: tuple[str, str] | None, prompt: str | None, max_tokens: int,
    temperature: float, seed: int, engine: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Chat with a finished model of RUN, a run directory or job file."""
    if stage and compare:
        raise click.UsageError("--stage cannot be used with --compare.")
    if as_json and prompt is None:
        raise click.UsageError("--json requires --prompt.")
    run_dir = find_run(run)
    folders = dict(finished_model(run_dir, name) for name in compare or (stage,))
    vllm = [engine_of(run_dir, folder, engine) for folder in folders.values()]
    if sys.stderr.isatty():
        click.echo(f"loading {', '.join(map(str, folders.values()))} …", err=True)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from hpc_rlhf.train.chat import load_models

    conversations = [
        Conversation(name, model, max_tokens, temperature, seed)
        for name, model in load_models(folders, vllm[0]).items()
    ]
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    if prompt is None:
        converse(conversations)
    elif as_json:
        for each in conversations:
            list(each.respond(prompt))
        print_json([each.as_dict() for each in conversations])
    else:
        respond(conversations, prompt)


def engine_of(run: RunDir, folder: Path, engine: str | None, here: bool = True) -> RolloutSpec | None:
    """How vLLM generates the responses of a finished model; None if it does not.

    The spec of a run that others could change is not heeded, because it names programs.

    Args:
        folder, engine, here: as ``rollout_checks.serving`` takes them.

    Raises:
        HpcRlhfError: vLLM cannot.
    """
    try:
        acting.check_owner(run)
    except HpcRlhfError:
        return rollout_checks.serving(None, folder, engine, here)
    return rollout_checks.serving(read_spec(run.job_yaml), folder, engine, here)
