"""Where each stage's time went, as bars over one common time, and each attempt as a row of a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from hpc_rlhf.observe.format import duration
from hpc_rlhf.observe.goodput.spans import SPANS, Goodput, Interruption, Stretch

WORDS = {
    "waiting": "waiting for another stage or a person",
    "queued": "queued",
    "starting": "starting",
    "productive": "training",
    "saving": "saving",
    "lost": "lost, and done again",
}
# Wide enough for every moment to have its place; the picture stretches to any width.
WIDTH = 10_000
_SMALLEST = 0.5  # parts of WIDTH that can be seen: the save of a second in a run of days cannot
_TICKS = 5
_NICE = [unit * many for unit, some in ((1, (1, 2, 5, 10, 30)), (60, (1, 2, 5, 10, 30)),
         (3600, (1, 2, 4, 6, 12)), (86400, (1, 2, 5, 10, 20, 50, 100))) for many in some]  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A part of a bar: its span, where it begins and how long it is in parts of WIDTH, and what it is, in words."""

    span: str
    left: float
    width: float
    words: str


@dataclass(frozen=True)
class Bar:
    """A stage's time.

    Attributes:
        marks: where it was interrupted, in parts of WIDTH, and why.
        words: where its time went, by span.
    """

    stage: str
    pieces: list[Piece]
    marks: list[tuple[float, str]]
    words: dict[str, str]


@dataclass(frozen=True)
class AttemptRow:
    """An attempt, in the words of the table."""

    stage: str
    attempt: str
    node: str
    began: str
    took: str
    trained: str
    lost: str
    ended: str


@dataclass(frozen=True)
class Timeline:
    """The picture and the table.

    Attributes:
        ticks: where marks of the time stand, in percent, and what they say.
        began: when the first stage was sent off.
    """

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    began: str
    attempts: list[AttemptRow]


def make_timeline(
    stages: Mapping[str, Goodput], states: Mapping[str, str], hosts: Mapping[str, str]
) -> Timeline:
    """The timeline of a run.

    Args:
        stages: what became of each stage's time.
        states: each stage's state in a word, for the attempt that was not interrupted.
        hosts: where each attempt began.
    """
    stretches = [each for stage in stages.values() for each in stage.stretches]
    if not stretches:
        return Timeline([], [], "", [])
    first, last = min(each.start for each in stretches), max(each.end for each in stretches)
    scale = WIDTH / max(last - first, 1e-3)
    bars = [_bar(name, stage, first, scale) for name, stage in stages.items() if stage.stretches]
    attempts = [row for name, stage in stages.items() for row in _attempts(name, stage, states[name], hosts)]
    return Timeline(bars, _ticks(last - first), moment(first), attempts)


def moment(time: float) -> str:
    """A time by the clock of the machine that writes the report."""
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _bar(name: str, stage: Goodput, first: float, scale: float) -> Bar:
    pieces = [
        Piece(
            each.span,
            round((each.start - first) * scale, 1),
            round(max(1.0, (each.end - each.start) * scale), 1),
            f"{WORDS[each.span]}: {duration(each.end - each.start)} from {moment(each.start)}",
        )
        for each in _joined(stage.stretches, _SMALLEST / scale)
    ]
    marks = [(round((each.time - first) * scale, 1), each.reason) for each in stage.interruptions]
    words = {span: _or_dash(getattr(stage.spans, span)) for span in SPANS}
    return Bar(name, pieces, marks, words)


def _joined(stretches: Sequence[Stretch], smallest: float) -> list[Stretch]:
    """Stretches of the same span that follow each other as one; those of fewer than ``smallest`` seconds are left out."""
    joined: list[Stretch] = []
    for each in stretches:
        if each.end - each.start < smallest:
            continue
        before = joined[-1] if joined else each
        alike = (before.span, before.attempt) == (each.span, each.attempt)
        if joined and alike and each.start - before.end < 2 * smallest:
            joined[-1] = replace(before, end=each.end)
        else:
            joined.append(each)
    return joined


def _attempts(name: str, stage: Goodput, state: str, hosts: Mapping[str, str]) -> list[AttemptRow]:
    broken = {each.attempt: each for each in stage.interruptions}
    own: dict[str, list[Stretch]] = {}
    for each in stage.stretches:
        if each.span not in ("waiting", "queued"):
            own.setdefault(each.attempt, []).append(each)
    return [_row(name, attempt, some, broken.get(attempt), state, hosts) for attempt, some in own.items()]


def _row(
    name: str,
    attempt: str,
    stretches: Sequence[Stretch],
    broken: Interruption | None,
    state: str,
    hosts: Mapping[str, str],
) -> AttemptRow:
    spent = {span: sum(each.end - each.start for each in stretches if each.span == span) for span in SPANS}
    first, last = min(each.start for each in stretches), max(each.end for each in stretches)
    return AttemptRow(
        name,
        attempt,
        hosts.get(attempt, ""),
        moment(first),
        duration(last - first),
        _or_dash(spent["productive"]),
        _or_dash(spent["lost"]),
        f"{broken.reason}, at step {broken.step:,}" if broken else state,
    )


def _or_dash(seconds: float) -> str:
    return duration(seconds) if seconds else "–"


def _ticks(seconds: float) -> list[tuple[float, str]]:
    """About five even marks from the beginning on."""
    step = next((nice for nice in _NICE if seconds / nice <= _TICKS), _NICE[-1])
    return [(round(100 * at / seconds, 2), _since(at)) for at in range(0, int(seconds) + 1, step)][
        : _TICKS + 1
    ]


def _since(seconds: int) -> str:
    """Such as 0, 30 s, 10 min, 6 h, 2 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds // length} {unit}"
    if seconds >= 60:
        return duration(seconds)
    return f"{seconds} s" if seconds else "0"
