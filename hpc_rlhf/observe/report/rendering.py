"""Render a page as one HTML file: text is escaped, only our own scripts can run, and nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from hpc_rlhf import __version__
from hpc_rlhf.observe.printable import printable

_HERE = Path(__file__).parent


def render(template: str, **content: object) -> str:
    """A template of this folder, with the scripts and styles of all pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_visible,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {}  # the order of a chart's lines decides their colours
    scripts = [_read("uplot/uPlot.iife.min.js"), _read("page.js")]
    page = environment.get_template(template).render(
        **content,
        styles=[_read("uplot/uPlot.min.css"), _read("page.css")],
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        writer=__version__,
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may hold bytes that are no text


def _visible(value: object) -> object:
    """Text without raw control characters; our own scripts and styles as they are."""
    return printable(value) if type(value) is str else value


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The hash by which the Content-Security-Policy allows a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
