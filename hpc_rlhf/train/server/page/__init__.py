"""The page of the server."""

from __future__ import annotations

from pathlib import Path

from hpc_rlhf.web.sealed import SHARED, seal

_HERE = Path(__file__).parent
_SCRIPTS = ("completion.js", "conversation.js", "votes.js", "turns.js", "page.js")


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


HTML, HEADERS = seal(_read("page.html"), _read("page.css"), [*SHARED, *map(_read, _SCRIPTS)])
