"""hpc-rlhf serve: serve trained models over an OpenAI-compatible API, with a page to try and compare them."""

from __future__ import annotations

import socket
import sys

import click

from hpc_rlhf.cli.arguments import engine_option, example, run_argument
from hpc_rlhf.cli.chat import engine_of
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import serving
from hpc_rlhf.observe.find import find_run
from hpc_rlhf.observe.models import finished_model
from hpc_rlhf.run import acting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import POLICIES
from hpc_rlhf.web.listening import LOCALHOST


@click.command(
    epilog=example(
        "hpc-rlhf serve my-job.yaml",
        "hpc-rlhf serve my-job.yaml --compare sft ppo",
        "hpc-rlhf serve my-job.yaml --stage sft --slurm",
    )
)
@run_argument
@click.option("--stage", type=click.Choice(tuple(POLICIES)), help="Model to serve.", show_default="the latest finished")
@click.option(
    "--compare", nargs=2, type=click.Choice(tuple(POLICIES)), help="Two models to compare blindly, or one twice."
)
@click.option("--record-user", is_flag=True, help="Let people give their name, and store it with their votes.")
@click.option(
    "--host",
    default=LOCALHOST,
    show_default=True,
    help="Address to listen on. The connection is not encrypted: for another address than the default, put a server "
    "with TLS in front.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@engine_option
@click.option("--slurm", "as_job", is_flag=True, help="Serve from a Slurm job, on a node like the stage's.")
def command(
    run: str, stage: str | None, compare: tuple[str, str] | None, record_user: bool, host: str, port: int,
    engine: str | None, as_job: bool,
) -> None:  # fmt: skip
    """Serve a finished model of RUN, a run directory or job file: a page to chat with it, and an OpenAI-compatible API.

    Open the first line that is printed in a browser. The second connects your own machine to a server on another
    one. Clients of the API must give the token that is printed as their API key; other users of this machine do not
    have it. The server offers chat completions, and refuses what it does not support. Simultaneous requests are
    answered together. vLLM starts a process of its own, and can spread a model over several GPUs.

    Votes that people give on the page are stored in the run; see hpc-rlhf feedback. Only with --record-user do they
    have a name.
    """
    if as_job and host != LOCALHOST:
        raise click.UsageError("--host cannot be used with --slurm: a job listens on its node's localhost only.")
    if stage and compare:
        raise click.UsageError("--stage cannot be used with --compare.")
    run_dir = find_run(run)
    chosen = [finished_model(run_dir, name) for name in compare or (stage,)]
    names, folders = [name for name, _ in chosen], dict(chosen)
    container = read_spec(run_dir.job_yaml).stage(POLICIES[names[-1]].name).slurm.container
    here = not (as_job and container)
    vllm, *_ = [engine_of(run_dir, folder, engine, here) for folder in folders.values()]
    what = " and ".join(folders)
    if not as_job:
        from hpc_rlhf.train.serve import serve

        token, votes = serving.new_token(), record_user if _stores_votes(run_dir) else None

        def announce() -> None:
            click.echo(f"serving {what} at {serving.url(host, port)}; press Ctrl-C to stop", err=True)
            click.echo(serving.how_to_use(names[-1], host, port, socket.gethostname(), token))
            sys.stdout.flush()

        serve(run_dir, names, host, port, token, announce, votes, vllm)
        return
    job_id, node, token = serving.serve_as_job(
        run_dir, names, port, record_user, vllm, lambda words: click.echo(words, err=True)
    )
    click.echo(f"job {job_id} serves {what} on {node}; to stop it: hpc-rlhf cancel {run}", err=True)
    click.echo(serving.how_to_use(names[-1], host, port, node, token))


def _stores_votes(run: RunDir) -> bool:
    """Whether votes can be stored in a run: others cannot lead what is written there to another place."""
    try:
        acting.check_owner(run)
    except HpcRlhfError as error:
        click.echo(f"votes are not stored: {error.message}", err=True)
        return False
    return True
