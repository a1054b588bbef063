"""Colours of errors and warnings on a terminal."""

from __future__ import annotations

import os
import re
from typing import TextIO

import click

# The beginnings of lines that name the kind of a message, or the place of a mistake in a spec.
_KINDS = {
    r"^(?:error|Error)(?=:)|^(?:[^\s:][^\n:]*:\d+:\d+|--set [^\s:]+)(?=: )": "red",
    r"^(?:[^\n]*?: )?warning(?=:)": "yellow",
    r"^  hint(?=:)": "cyan",
}


def shows_colours(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colours, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def coloured(text: str, stream: TextIO) -> str:
    """The text with colours if the stream shows them."""
    if not shows_colours(stream):
        return text
    for pattern, colour in _KINDS.items():
        text = re.sub(pattern, click.style(r"\g<0>", fg=colour, bold=True), text, flags=re.MULTILINE)
    return text
