"""Writes a spec as YAML with comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from hpc_rlhf.spec.load import Dumper

_WIDTH = 110


def commented(fields: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """The text of a spec.

    Args:
        fields: plain values.
        notes: a comment for the line above each field, by the path of the field; that of the whole spec has the empty
            path.
    """
    return "\n".join([*_comment(notes.get("", ""), ""), *_mapping(fields, notes, (), "")]) + "\n"


def _mapping(fields: Mapping[str, Any], notes: Mapping[str, str], path: tuple[str, ...], indent: str) -> Iterator[str]:
    for key, value in fields.items():
        at = (*path, key)
        yield from _comment(notes.get(".".join(at), ""), indent)
        if value and any(note.startswith(".".join((*at, ""))) for note in notes):
            yield f"{indent}{key}:"
            yield from (_list if isinstance(value, list) else _mapping)(value, notes, at, f"{indent}  ")
        else:
            yield from _plain({key: value}, indent)


def _list(values: list[Any], notes: Mapping[str, str], path: tuple[str, ...], indent: str) -> Iterator[str]:
    for place, value in enumerate(values):
        yield from _comment(notes.get(".".join((*path, str(place))), ""), indent)
        yield from _plain([value], indent)


def _plain(value: dict[str, Any] | list[Any], indent: str) -> Iterator[str]:
    """A mapping or list in block style; the mappings and lists in it that have only scalars are one line each."""
    inner = next(iter(value.values() if isinstance(value, dict) else value))
    style = None if isinstance(inner, dict | list) else False
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=style, sort_keys=False, allow_unicode=True, width=_WIDTH)
    yield from textwrap.indent(text, indent).splitlines()


def _comment(note: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(
        note, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
