"""A finding of the doctor: the result of one check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: what was checked, such as requeue.
        level: error if a run would fail or could not survive a preemption; warning if it might.
        message: what was found, in one sentence.
        fix: what to do about it; empty if nothing needs to be done.
        where: the machine, nodes or stages that it applies to.
    """

    check: str
    level: Level
    message: str
    fix: str = ""
    where: str = "here"

    def at(self, where: str) -> Finding:
        return replace(self, where=where)


def ok(check: str, message: str) -> Finding:
    return Finding(check, "ok", message)


def warning(check: str, message: str, fix: str) -> Finding:
    return Finding(check, "warning", message, fix)


def error(check: str, message: str, fix: str) -> Finding:
    return Finding(check, "error", message, fix)
