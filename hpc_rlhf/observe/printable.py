"""Text of logs, ledgers and models for a terminal: characters that control it are shown instead of sent."""

from __future__ import annotations

import re

# All of ASCII's and Latin-1's controls but tab and newline, and those that reorder the text around them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with controls as escapes, such as ``\\x1b``. A carriage return, with which progress bars overwrite their
    line, becomes a newline."""
    return _CONTROLS.sub(_escape, text.replace("\r\n", "\n").replace("\r", "\n"))


def printable_json(text: str) -> str:
    """JSON with the controls that it may contain as JSON's own escapes."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
