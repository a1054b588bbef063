"""Where a server listens."""

from __future__ import annotations

import errno
import socket
from importlib.util import find_spec

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.format import listed

LOCALHOST = "127.0.0.1"


def check_installed(*modules: str) -> None:
    """Raise HpcRlhfError if a module that a server needs is missing."""
    if missing := [module for module in modules if not find_spec(module)]:
        raise HpcRlhfError(f"the server needs {listed(missing)}", hint="pip install 'hpc-rlhf[serve]'")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is reported before anything else is done.

    Raises:
        HpcRlhfError: the address cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise HpcRlhfError(
            "something else listens there" if in_use else f"this machine cannot listen there ({error.strerror})",
            where=f"{host}:{port}",
            hint="choose another port with --port" if in_use else "choose another address with --host",
            exit_code=RUN_FAILED,
        ) from error
