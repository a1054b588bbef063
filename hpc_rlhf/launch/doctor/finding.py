"""What the doctor says: one finding for each thing it looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Attributes:
        check: what was looked at, such as requeue.
        level: error where a run would fail or could not survive; warning where it may.
        said: what was found, in a sentence.
        cure: what to do about it; empty where nothing is to be done.
        where: the machine or nodes, or the stages, that it holds for.
    """

    check: str
    level: Level
    said: str
    cure: str = ""
    where: str = "here"

    def at(self, where: str) -> Finding:
        return replace(self, where=where)


def ok(check: str, said: str) -> Finding:
    return Finding(check, "ok", said)


def warning(check: str, said: str, cure: str) -> Finding:
    return Finding(check, "warning", said, cure)


def error(check: str, said: str, cure: str) -> Finding:
    return Finding(check, "error", said, cure)
