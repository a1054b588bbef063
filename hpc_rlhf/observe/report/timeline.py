"""The timeline of a run: each stage's time as a bar on a common axis, and each attempt as a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from hpc_rlhf.observe.goodput.spans import SPANS, Goodput, Stretch
from hpc_rlhf.run.format import duration

# Titles of the spans of time.
TITLES = {
    "waiting": "waiting for another stage or the user",
    "queued": "queued",
    "starting": "starting",
    "productive": "training",
    "saving": "saving",
    "lost": "lost, done again",
}
# Units of the horizontal axis; the picture scales to any width.
WIDTH = 10_000
_SMALLEST = 0.5  # units that are still visible: a save of a second in a run of days is not
_TICKS = 5
_NICE = [unit * many for unit, some in ((1, (1, 2, 5, 10, 30)), (60, (1, 2, 5, 10, 30)),
         (3600, (1, 2, 4, 6, 12)), (86400, (1, 2, 5, 10, 20, 50, 100))) for many in some]  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A part of a bar: its span, its left end and width in units of WIDTH, and a description."""

    span: str
    left: float
    width: float
    description: str


@dataclass(frozen=True)
class Bar:
    """The time of a stage.

    Attributes:
        marks: its interruptions, each with its place in units of WIDTH and its reason.
        totals: its time in each span.
    """

    stage: str
    segments: list[Segment]
    marks: list[tuple[float, str]]
    totals: dict[str, str]


@dataclass(frozen=True)
class Timeline:
    """The bars and the table of attempts.

    Attributes:
        ticks: ticks of the axis, each with its place in percent and its label.
        began: when the first stage was submitted or started.
        attempts: the rows of the table, by column.
    """

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    began: str
    attempts: list[dict[str, str]]


def make_timeline(stages: Mapping[str, Goodput], states: Mapping[str, str], hosts: Mapping[str, str]) -> Timeline:
    """The timeline of a run.

    Args:
        stages: the goodput of each stage.
        states: the state of each stage, shown for an attempt that was not interrupted.
        hosts: the node on which each attempt began.
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
    """A time in the time zone of the machine that writes the report."""
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _bar(name: str, stage: Goodput, first: float, scale: float) -> Bar:
    segments = [
        Segment(
            each.span,
            round((each.start - first) * scale, 1),
            round(max(1.0, each.seconds * scale), 1),
            f"{TITLES[each.span]}: {duration(each.seconds)} from {moment(each.start)}",
        )
        for each in _joined(stage.stretches, _SMALLEST / scale)
    ]
    marks = [(round((each.time - first) * scale, 1), each.reason) for each in stage.interruptions]
    totals = {span: _or_dash(getattr(stage.spans, span)) for span in SPANS}
    return Bar(name, segments, marks, totals)


def _joined(stretches: Sequence[Stretch], smallest: float) -> list[Stretch]:
    """Merge consecutive stretches of the same span, leaving out those shorter than ``smallest`` seconds."""
    joined: list[Stretch] = []
    for each in stretches:
        if each.seconds < smallest:
            continue
        before = joined[-1] if joined else each
        same = (before.span, before.attempt) == (each.span, each.attempt)
        if joined and same and each.start - before.end < 2 * smallest:
            joined[-1] = replace(before, end=each.end)
        else:
            joined.append(each)
    return joined


def _attempts(name: str, stage: Goodput, state: str, hosts: Mapping[str, str]) -> list[dict[str, str]]:
    interruptions = {each.attempt: each for each in stage.interruptions}
    stretches: dict[str, list[Stretch]] = {}
    for each in stage.stretches:
        if each.span not in ("waiting", "queued"):
            stretches.setdefault(each.attempt, []).append(each)
    rows = []
    for attempt, own in stretches.items():
        first, last = min(each.start for each in own), max(each.end for each in own)
        interruption = interruptions.get(attempt)
        rows.append(
            {
                "stage": name,
                "attempt": attempt,
                "node": hosts.get(attempt, ""),
                "began": moment(first),
                "took": duration(last - first),
                "trained": _or_dash(sum(each.seconds for each in own if each.span == "productive")),
                "lost": _or_dash(sum(each.seconds for each in own if each.span == "lost")),
                "ended": f"{interruption.reason}, at step {interruption.step:,}" if interruption else state,
            }
        )
    return rows


def _or_dash(seconds: float) -> str:
    return duration(seconds) if seconds else "–"


def _ticks(seconds: float) -> list[tuple[float, str]]:
    """About five evenly spaced ticks."""
    step = next((nice for nice in _NICE if seconds / nice <= _TICKS), _NICE[-1])
    return [(round(100 * at / seconds, 2), _since(at)) for at in range(0, int(seconds) + 1, step)][: _TICKS + 1]


def _since(seconds: int) -> str:
    """Such as 0, 30 s, 10 min, 6 h, 2 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds // length} {unit}"
    return duration(seconds) if seconds else "0"
