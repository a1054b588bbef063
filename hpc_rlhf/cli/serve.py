"""hpc-rlhf serve: serve a trained model over an OpenAI-compatible API."""

from __future__ import annotations

import click

from hpc_rlhf.cli.arguments import example, find_run
from hpc_rlhf.cli.chat import finished_model
from hpc_rlhf.launch import serving
from hpc_rlhf.spec.stages import POLICIES


@click.command(epilog=example("hpc-rlhf serve my-job.yaml", "hpc-rlhf serve my-job.yaml --stage sft --slurm"))
@click.argument("run")
@click.option("--stage", type=click.Choice(tuple(POLICIES)), help="Model to serve.", show_default="the latest finished")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. There is no access control: with any other address than the default, whoever "
    "reaches the port can use the model.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--slurm", "as_job", is_flag=True, help="Serve from a Slurm job, on a node like the stage's.")
def command(run: str, stage: str | None, host: str, port: int, as_job: bool) -> None:
    """Serve a finished model of RUN, a run directory or job file, over an OpenAI-compatible API.

    Uses vLLM if it is installed, transformers otherwise.
    """
    if as_job and host != serving.LOCALHOST:
        raise click.UsageError("--host cannot be used with --slurm: a job listens on its node's localhost only.")
    run_dir = find_run(run)
    name, folder = finished_model(run_dir, stage)

    def announce() -> None:
        click.echo(f"serving {name} at http://{host}:{port}/v1; press Ctrl-C to stop", err=True)
        click.echo(serving.request(name, port))

    if not as_job:
        serving.serve_here(name, folder, host, port, announce)
        return
    job_id, node = serving.serve_as_job(
        run_dir, name, POLICIES[name].name, folder, port, lambda words: click.echo(words, err=True)
    )
    click.echo(
        f"job {job_id} serves {name} on {node}, ready in about a minute; to stop it: scancel {job_id}\n"
        f"ssh -N -L {port}:127.0.0.1:{port} {node}\n{serving.request(name, port)}"
    )
