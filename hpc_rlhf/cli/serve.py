"""hpc-rlhf serve: let programs talk to the model that a run has made."""

from __future__ import annotations

import click

from hpc_rlhf.cli.chat import MODELS, finished_model
from hpc_rlhf.cli.options import example
from hpc_rlhf.cli.run_argument import find_run


@click.command(
    "serve", epilog=example("hpc-rlhf serve my-job.yaml", "hpc-rlhf serve my-job.yaml --stage sft --slurm")
)
@click.argument("run", metavar="RUN")
@click.option("--stage", type=click.Choice(MODELS), help="Whose model; the latest finished one by default.")
@click.option(
    "--host", default="127.0.0.1", show_default=True,
    help="Where to listen. Whoever reaches another address than the default may use the model.",
)  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--slurm", "as_job", is_flag=True, help="In a job, on one node like those of the stage.")
def command(run: str, stage: str | None, host: str, port: int, as_job: bool) -> None:
    """Serve the finished model of RUN by OpenAI's protocol: vLLM where it is installed, else transformers."""
    from hpc_rlhf.launch import serving

    if as_job and host != serving.LOCALHOST:
        raise click.UsageError("--host and --slurm cannot be used together: a job listens on its node alone.")
    found = find_run(run)
    name, folder = finished_model(found, stage)

    def tell() -> None:
        click.echo(f"{name} answers at http://{host}:{port}/v1; Ctrl-C ends it", err=True)
        click.echo(serving.request(name, port))

    if not as_job:
        serving.serve_here(name, folder, host, port, tell)
        return
    owner = "ppo" if name == "ema" else name
    job_id, node = serving.serve_as_job(
        found, name, owner, folder, port, lambda words: click.echo(words, err=True)
    )
    click.echo(
        f"job {job_id} serves {name} on {node}; in a minute, and until scancel {job_id}:\n"
        f"ssh -N -L {port}:127.0.0.1:{port} {node}\n{serving.request(name, port)}"
    )
