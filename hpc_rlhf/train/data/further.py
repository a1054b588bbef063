"""The further columns of a row: those that no format reads as content, for rewards, such as a reference answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

# The dialogue as a transcript, beside the further columns. A column of the data with this name gives way to it.
PROMPT = "prompt"


def to_json(columns: Mapping[str, Any]) -> str:
    """A row's further columns as JSON, without those that JSON cannot hold, such as bytes and images.

    NaN becomes null; dates and decimal numbers become text.
    """
    texts = {name: _cell(cell) for name, cell in columns.items()}
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in texts.items() if text is not None) + "}"


def _cell(cell: Any) -> str | None:
    if isinstance(cell, float) and cell != cell:
        return "null"
    try:
        return json.dumps(cell, default=_other)
    except (TypeError, ValueError, RecursionError):
        return None


def _other(cell: Any) -> str:
    if isinstance(cell, (date, time, Decimal)):
        return str(cell)
    raise TypeError


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The further columns of some token rows, as a ``RewardSource`` takes them: by name, with a cell for each row.

    Every stage, rank and step has the same names: those of all its data. A row of a source without such a column has
    None. Beside them is ``PROMPT``, unless no stage of the run has ``rewards``.
    """
    if not rows or "columns" not in rows[0]:
        return {}
    further = {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"] if name != PROMPT}
    return {PROMPT: [row["prompt"] for row in rows], **further}
