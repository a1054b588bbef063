"""The page: one HTML document with its style and script inside, and headers that let nothing else run in it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

_HERE = Path(__file__).parent
_SCRIPTS = ("elements.js", "server.js", "conversation.js", "votes.js", "turns.js", "page.js")


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE = _read("page.css")
_SCRIPT = '"use strict";\n' + "\n".join(map(_read, _SCRIPTS))
HTML = _read("page.html").replace("/* page.css */", _STYLE).replace("/* script */", _SCRIPT)
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_digest(_SCRIPT)}; style-src {_digest(_STYLE)}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
