"""Replace files in one step, so that no reader and no crash ever sees half of one."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_system_error(error: Exception) -> OSError | None:
    """An exception as the error of the file system that it reports; None if it reports none.

    Libraries in Rust, such as safetensors and tokenizers, raise other exceptions, with the error's number in the text.
    """
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Create a folder and those above it, unless they exist. Whatever the umask, only the owner may write to them."""
    for parent in reversed([each for each in path.parents if not each.exists()]):
        parent.mkdir(0o755, exist_ok=True)
    path.mkdir(mode, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which replaces the file when the block succeeds."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, durable: bool = False) -> None:
    """Replace a text file.

    Args:
        durable: flush the content to disk before it replaces the file.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        if durable:
            fsync_path(partial)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, on disk when this returns.

    It is a single ``write`` to a file opened for append, so lines of several writers never mix on a POSIX file system.
    A line cut short by a crash or a full disk is closed before this one, which would otherwise be lost with it.
    """
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        os.write(fd, ("\n" * torn + line + "\n").encode())
        os.fsync(fd)
    finally:
        os.close(fd)
