"""Masks secrets in text that is shown or stored: values that a shell line assigns to names such as HF_TOKEN, and
passwords in URLs."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
_NAME = r"\w*(?:KEY|TOKEN|SECRET|PASSWORD)\w*"
_VALUE = r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|\$\([^)]*\)|\\.|[^\s;&|"'\\])+"""
_ASSIGNED = re.compile(rf"\b({_NAME})=({_VALUE})", re.I)
_IN_URL = re.compile(r"(://[^\s/:@]*:)[^\s/@]+@")
# A value that another place holds, such as $TOKEN or $(cat file).
_REFERENCE = re.compile(r"""["']?\$(\w+|\{\w+\}|\(.*\))["']?""")


def mask(text: str) -> str:
    """The text with a mask in place of each secret."""
    return _IN_URL.sub(rf"\1{MASK}@", _ASSIGNED.sub(rf"\1={MASK}", text))


def mask_all(facts: Any) -> Any:
    """JSON values with a mask in place of each secret in their texts. Tuples become lists."""
    if isinstance(facts, str):
        return mask(facts)
    if isinstance(facts, dict):
        return {key: mask_all(value) for key, value in facts.items()}
    return [mask_all(each) for each in facts] if isinstance(facts, list | tuple) else facts


def secret_names(line: str) -> list[str]:
    """The names to which a shell line assigns a secret itself, rather than a reference to it."""
    return [name for name, value in _ASSIGNED.findall(line) if not _REFERENCE.fullmatch(value)]
