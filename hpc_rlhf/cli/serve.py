"""hpc-rlhf serve: serve a trained model over an OpenAI-compatible API."""

from __future__ import annotations

import sys

import click

from hpc_rlhf.cli.arguments import engine_option, example, find_run, run_argument
from hpc_rlhf.cli.chat import engine_of, finished_model
from hpc_rlhf.launch import serving
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import POLICIES


@click.command(epilog=example("hpc-rlhf serve my-job.yaml", "hpc-rlhf serve my-job.yaml --stage sft --slurm"))
@run_argument
@click.option("--stage", type=click.Choice(tuple(POLICIES)), help="Model to serve.", show_default="the latest finished")
@click.option(
    "--host",
    default=serving.LOCALHOST,
    show_default=True,
    help="Address to listen on. The connection is not encrypted: for another address than the default, put a server "
    "with TLS in front.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@engine_option
@click.option("--slurm", "as_job", is_flag=True, help="Serve from a Slurm job, on a node like the stage's.")
def command(run: str, stage: str | None, host: str, port: int, engine: str | None, as_job: bool) -> None:
    """Serve a finished model of RUN, a run directory or job file, over an OpenAI-compatible API.

    Clients must give the token that is printed as their API key; other users of this machine do not have it.
    The server offers chat completions, and refuses what it does not support. Simultaneous requests are answered
    together. vLLM starts a process of its own, and can spread a model over several GPUs.
    """
    if as_job and host != serving.LOCALHOST:
        raise click.UsageError("--host cannot be used with --slurm: a job listens on its node's localhost only.")
    run_dir = find_run(run)
    name, folder = finished_model(run_dir, stage)
    contained = as_job and read_spec(run_dir.job_yaml).stage(POLICIES[name].name).slurm.container is not None
    vllm = engine_of(run_dir, folder, engine, here=not contained)
    if not as_job:
        from hpc_rlhf.train.serve import serve

        token = serving.new_token()

        def announce() -> None:
            click.echo(f"serving {name} at {serving.url(host, port)}; press Ctrl-C to stop", err=True)
            click.echo(serving.how_to_use(name, serving.url(host, port), token))
            sys.stdout.flush()

        serve(folder.resolve(), name, host, port, token, announce, vllm)
        return
    job_id, node, token = serving.serve_as_job(
        run_dir, name, POLICIES[name].name, folder, port, vllm, lambda words: click.echo(words, err=True)
    )
    click.echo(f"job {job_id} serves {name} on {node}; to stop it: hpc-rlhf cancel {run}", err=True)
    base = serving.url(serving.LOCALHOST, port)
    # Without the option, ssh goes on if the port is in use, and clients send the token to whoever listens there.
    click.echo(f"ssh -N -o ExitOnForwardFailure=yes -L {port}:127.0.0.1:{port} {node}")
    click.echo(serving.how_to_use(name, base, token))
