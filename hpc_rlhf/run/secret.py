"""A run's secret, by which its ranks recognize each other."""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress

from hpc_rlhf.run.layout import RunDir


def read(run: RunDir) -> bytes:
    """The secret, which only the run's owner can read. If there is none, it is made, even by several ranks at once."""
    path = run.secret
    if not path.exists():
        partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another rank was faster
            os.link(partial, path)
        partial.unlink()
    return path.read_bytes()
