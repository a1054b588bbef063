"""Makes text of logs, ledgers and models safe for a terminal: control characters are shown, not sent."""

from __future__ import annotations

import re

# The control characters of ASCII and Latin-1, except tab and newline, and Unicode's that reorder text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters as escapes, such as ``\\x1b``. A carriage return, with which progress bars
    overwrite their line, becomes a newline."""
    return _CONTROLS.sub(_escape, text.replace("\r\n", "\n").replace("\r", "\n"))


def printable_json(text: str) -> str:
    """JSON text with its control characters as JSON's own escapes."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
