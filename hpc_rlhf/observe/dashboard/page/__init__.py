"""The page of the dashboard, with the styles and curves of the report."""

from __future__ import annotations

from pathlib import Path

from hpc_rlhf.observe.report.rendering import SCRIPTS, STYLES
from hpc_rlhf.web.sealed import SHARED, seal

_HERE = Path(__file__).parent
_SCRIPTS = ("runs.js", "details.js", "page.js")


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


HTML, HEADERS = seal(
    _read("page.html"),
    "\n".join([*STYLES, _read("page.css")]),
    [*SCRIPTS, *SHARED, *map(_read, _SCRIPTS)],
    style_attributes=True,
)
