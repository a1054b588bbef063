"""Fewer points of a long curve, without losing a peak. Pure."""

from __future__ import annotations

from collections.abc import Sequence

# Points that a curve keeps, about: more than a chart has pixels across.
MOST = 600

Values = Sequence[float | None]


def kept(columns: Sequence[Values], most: int = MOST) -> list[int]:
    """Which points of some curves over the same steps are drawn, in order; all where there are at most ``most``.

    Of each of ``most / 2`` even stretches, every curve's lowest and its highest point, so that no spike is lost; and the
    first and the last of all.
    """
    length = len(columns[0]) if columns else 0
    if length <= most:
        return list(range(length))
    width = -(-length // (most // 2))
    chosen = {0, length - 1}
    for start in range(0, length, width):
        for column in columns:
            known = [
                (value, at)
                for at, value in enumerate(column[start : start + width], start)
                if value is not None
            ]
            if known:
                chosen |= {min(known)[1], max(known)[1]}
    return sorted(chosen)
