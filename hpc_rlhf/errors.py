"""The exceptions a user may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INPUT_WRONG = 2
RUN_FAILED = 1
STOPPED_EARLY = 4  # of a rank: its trial is worse than others of the search
# The process has stopped on request, and is to be run again (sysexits.h: EX_TEMPFAIL).
TO_BE_CONTINUED = 75


class HpcRlhfError(Exception):
    """A mistake or failure put in one clear message.

    Args:
        message: what is wrong, in a sentence.
        where: the place it was found (a file, ``file:line:col``, a stage, a job).
        hint: what to do next.
        exit_code: what the process ends with; 2 when the input was wrong, 1 when the run failed.
    """

    def __init__(
        self, message: str, where: str | None = None, hint: str | None = None, exit_code: int = INPUT_WRONG
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a job spec.

    Attributes:
        source: the file's name as the user gave it, or ``--set a.b.c``.
        line: 1-based line, 0 when the problem has no place in a file.
        column: 1-based column, 0 when the problem has no place in a file.
        path: dotted path of the field, such as ``stages.ppo.lr``; empty for the whole file.
        what: what is wrong.
        hint: what to do next, or None.
    """

    source: str
    line: int
    column: int
    path: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        named = not self.path or place == f"--set {self.path}"
        text = f"{place}: {self.what}" if named else f"{place}: {self.path}: {self.what}"
        return f"{text} ({self.hint})" if self.hint else text


class SpecError(HpcRlhfError):
    """Every problem found in a job spec, at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))
