"""The --out of the verbs that write files: what cannot be written there is the user's mistake, and said as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise HpcRlhfError where the block cannot write."""
    try:
        yield
    except FileExistsError as error:
        raise HpcRlhfError(
            "there is a file already",
            where=str(error.filename),
            hint="choose another with --out, or remove it",
        ) from error
    except OSError as error:
        raise HpcRlhfError(f"cannot write it: {error.strerror}", where=str(error.filename or out)) from error
