"""hpc-rlhf dashboard: show all runs below a folder on a page."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import click

from hpc_rlhf.cli.arguments import example
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import serving
from hpc_rlhf.web.listening import LOCALHOST, check_installed


@click.command(epilog=example("hpc-rlhf dashboard $SCRATCH/runs"))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(1, 65535), default=8001, show_default=True)
def command(folder: Path, port: int) -> None:
    """Serve a live page over all runs in DIR: states, progress, interruptions and goodput, and for the runs that you
    choose, curves in the same charts, and evaluations and responses side by side.

    Open the first line that is printed in a browser. The second connects your own machine to this one; other users of
    this machine do not have the token in the address. DIR is searched two folders deep; runs that cannot be read are
    left out and counted. Nothing is changed, and the page needs no network.
    """
    if not folder.is_dir():
        raise HpcRlhfError("is not a folder", where=str(folder), hint="give a folder that holds run directories")
    check_installed("fastapi", "uvicorn")
    from hpc_rlhf.observe.dashboard.app import serve

    token = serving.new_token()

    def announce() -> None:
        click.echo(f"watching {folder}; press Ctrl-C to stop", err=True)
        click.echo(serving.how_to_open(LOCALHOST, port, socket.gethostname(), token))
        sys.stdout.flush()

    serve(folder, port, token, announce)
