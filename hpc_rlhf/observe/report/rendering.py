"""Render a page as one HTML file: text is escaped, only our own scripts can run, and nothing is loaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rlhf import __version__
from hpc_rlhf.observe.printable import printable
from hpc_rlhf.web.sealed import digest

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


# What draws curves.
STYLES = (_read("uplot/uPlot.min.css"), _read("page.css"))
SCRIPTS = (_read("uplot/uPlot.iife.min.js"), _read("curves.js"))


def render(template: str, **content: object) -> str:
    """A template of this folder, with the scripts and styles of all pages."""
    scripts = [*SCRIPTS, _read("page.js")]
    page = (
        _environment()
        .get_template(template)
        .render(
            **content, styles=STYLES, scripts=scripts, hashes=[digest(script) for script in scripts], writer=__version__
        )
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may hold bytes that are no text


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_visible,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {}  # the order of a chart's lines decides their colours
    return environment


def _visible(value: object) -> object:
    """Text without raw control characters; our own scripts and styles as they are."""
    return printable(value) if type(value) is str else value
