"""A common time for events that several machines wrote, whose clocks may be wrong. Pure functions.

The order of a ledger's lines is right whatever their times are: a line comes after those that were there before it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from hpc_rlhf.run.events import Event

# Who wrote some consecutive lines, and their earliest and latest time by that clock.
_Lines = tuple[str, float, float]

# Seconds by which an event may seem to precede the line above it because two processes wrote at once.
_CLOCKS_DIFFER = 1.0
# Seconds. Machines with synchronized clocks never differ by this much, so one of the clocks is wrong.
_WRONG = 60.0
_NO_ATTEMPT = "\0"  # prefix of the names of other writers
_READER = f"{_NO_ATTEMPT}reader"


class Clock:
    """Times that never go backwards.

    Args:
        events: a ledger's, in the order written.
        now: Unix seconds by the clock of the machine that reads them; 0 if unknown.

    Attributes:
        now: the time of the last event that was yielded.
    """

    def __init__(self, events: Sequence[Event], now: float = 0.0) -> None:
        self._ledger, self._writers = events, _writers(events)
        lines = _lines(events, self._writers)
        self._off = _corrections([*lines, (_READER, now, now)] if now else lines)
        self.now = -math.inf

    def events(self) -> Iterator[tuple[Event, float]]:
        """The events in order, each with its time in Unix seconds, which never decreases."""
        for event, writer in zip(self._ledger, self._writers, strict=True):
            time = self.corrected(writer, event.time)
            if time < self.now - _CLOCKS_DIFFER and not writer.startswith(_NO_ATTEMPT):
                self._off[writer] = self._off.get(writer, 0.0) + self.now - time
            self.now = max(self.now, time)
            yield event, self.now

    def corrected(self, attempt: str, time: float) -> float:
        """A time by an attempt's clock, corrected."""
        return time + self._off.get(attempt, 0.0)


def _writers(events: Sequence[Event]) -> list[str]:
    """Who wrote each event: an attempt, or one unknown writer for consecutive lines without an attempt."""
    writers: list[str] = []
    for at, event in enumerate(events):
        name = getattr(event, "attempt", "")
        same = bool(writers) and writers[-1].startswith(_NO_ATTEMPT)
        writers.append(name or (writers[-1] if same else f"{_NO_ATTEMPT}{at}"))
    return writers


def _lines(events: Sequence[Event], writers: Sequence[str]) -> list[_Lines]:
    lines = []
    for writer, group in groupby(zip(writers, events, strict=True), key=itemgetter(0)):
        times = [event.time for _, event in group]
        lines.append((writer, min(times), max(times)))
    return lines


def _corrections(lines: Sequence[_Lines]) -> dict[str, float]:
    """Seconds to add to the times of writers with a wrong clock: the smallest that make them fit the others'.

    The clocks taken to be wrong are those that contradict most others. Of two that contradict only each other, it is
    the one without which the run is shorter, since an extra day is more likely a wrong clock than a day of waiting.
    """
    right, wrong = list(lines), []
    while against := _contradictions(right):
        most = max(against.values())
        worst = min(
            (who for who in against if against[who] == most),
            key=lambda who: (_length(right, who), who == _READER, not who.startswith(_NO_ATTEMPT), who),
        )
        right = [each for each in right if each[0] != worst]
        wrong.append(worst)
    off: dict[str, float] = {}
    for who in reversed(wrong):
        off[who] = _fitting(lines, who, off, [other for other in wrong if other not in off])
    return off


def _contradictions(lines: Sequence[_Lines]) -> Counter[str]:
    """How many others each writer contradicts: its line claims to be much older than one above it."""
    latest: dict[str, float] = {}
    pairs: set[frozenset[str]] = set()
    newest = -math.inf
    for writer, first, last in lines:
        if newest - first > _WRONG:
            pairs |= {
                frozenset((writer, who)) for who, before in latest.items() if who != writer and before - first > _WRONG
            }
        latest[writer] = max(last, latest.get(writer, last))
        newest = max(newest, last)
    return Counter(who for pair in pairs for who in pair)


def _length(lines: Sequence[_Lines], without: str) -> float:
    others = [(first, last) for writer, first, last in lines if writer != without]
    return max(last for _, last in others) - min(first for first, _ in others)


def _fitting(lines: Sequence[_Lines], who: str, off: Mapping[str, float], unknown: Collection[str]) -> float:
    """The smallest correction that fits a writer's lines between the others, else after those above."""
    least, most, before, after = -math.inf, math.inf, -math.inf, math.inf
    known = [each for each in lines if each[0] == who or each[0] not in unknown]
    for writer, first, last in known:
        if writer == who:
            least = max(least, before - first)
        else:
            before = max(before, last + off.get(writer, 0.0))
    for writer, first, last in reversed(known):
        if writer == who:
            most = min(most, after - last)
        else:
            after = min(after, first + off.get(writer, 0.0))
    return max(least, min(most, 0.0))
