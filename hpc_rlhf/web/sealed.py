"""A page in one document, with its style and scripts inside, and headers that let nothing else run in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).parent
# Scripts that pages share: elements, and requests with the token.
SHARED = tuple((_HERE / name).read_text(encoding="utf-8") for name in ("elements.js", "requests.js"))


def digest(text: str) -> str:
    """The hash by which a Content-Security-Policy allows a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def seal(
    document: str, style: str, scripts: Sequence[str], style_attributes: bool = False
) -> tuple[str, dict[str, str]]:
    """The page and its headers.

    Args:
        document: HTML with the places ``/* style */`` and ``/* script */``.
        style_attributes: whether elements may have a style of their own.
    """
    script = '"use strict";\n' + "\n".join(scripts)
    attributes = "style-src-attr 'unsafe-inline'; " if style_attributes else ""
    headers = {
        "Content-Security-Policy": f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; "
        f"{attributes}connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return document.replace("/* style */", style).replace("/* script */", script), headers
