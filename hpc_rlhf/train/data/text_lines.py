"""The content of a local file, decompressed, and its lines as text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from hpc_rlhf.errors import HpcRlhfError

_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def open_content(path: Path) -> BinaryIO:
    """A file's content, decompressed if it is compressed, whatever its name says."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(_ZSTD):
        if find_spec("zstandard") is None:
            hint = "pip install zstandard, or decompress the file: unzstd FILE"
            raise HpcRlhfError("reading .zst needs the package zstandard", where=str(path), hint=hint)
        return io.BufferedReader(import_module("zstandard").open(path, "rb"))
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)
    return io.BufferedReader(opener(path, "rb"))


def numbered_lines(path: Path, ends: str | None = None) -> Iterator[tuple[int, str]]:
    """A text file's lines with their numbers; UTF-8 unless the file begins with a mark of another encoding.

    Args:
        ends: as ``newline`` of ``open``.

    Raises:
        HpcRlhfError: a line is not in that encoding.
    """
    number = 0
    with open_content(path) as file:
        start = file.peek(4)  # type: ignore[attr-defined]
        encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), "utf-8")
        try:
            text = io.TextIOWrapper(file, encoding, "surrogateescape", newline=ends)
            for number, line in enumerate(text, 1):
                if not line.isascii():
                    line.encode()
                yield number, line
        except UnicodeEncodeError as error:
            place, byte = f"{path}:{number}:{error.start + 1}", ord(error.object[error.start]) - 0xDC00
            raise _not_text(place, f"the byte 0x{byte:02x} is not {encoding.upper()}") from error
        except UnicodeDecodeError as error:
            raise _not_text(f"{path}:{number + 1}", f"the line is not {encoding.upper()} ({error.reason})") from error


def _not_text(where: str, what: str) -> HpcRlhfError:
    return HpcRlhfError(what, where, "convert the file to UTF-8, such as from latin-1: iconv -f latin1 -t utf-8 FILE")
