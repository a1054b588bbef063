"""Which documents of plain text are left out, by rules that hold in any language."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from hpc_rlhf.run.row_counts import Outcome
from hpc_rlhf.spec.stages.pretrain import FilterSpec


def refused(text: str, rules: FilterSpec) -> Outcome | None:
    """The first rule that a document breaks; None if it keeps all. A rule that is not set costs nothing."""
    checks: dict[Outcome, Callable[[], bool]] = {
        Outcome.TOO_FEW_CHARACTERS: lambda: len(text) < rules.min_characters,
        Outcome.TOO_MANY_CHARACTERS: lambda: rules.max_characters is not None and len(text) > rules.max_characters,
        Outcome.FEW_LETTERS: lambda: rules.min_letters > 0 and letters(text) < rules.min_letters,
        Outcome.REPEATED_LINES: lambda: rules.max_repeated < 1 and repeated(text) > rules.max_repeated,
        Outcome.COMPRESSIBLE: lambda: rules.max_compression is not None and compression(text) > rules.max_compression,
    }
    return next((outcome for outcome, breaks in checks.items() if breaks()), None)


def letters(text: str) -> float:
    """The share of letters and digits, in any script, among a text's characters without spaces."""
    characters = "".join(text.split())
    return sum(map(str.isalnum, characters)) / max(1, len(characters))


def repeated(text: str) -> float:
    """The share of a text's characters in lines that are equal to an earlier one, without spaces around them."""
    seen, whole, again = set[str](), 0, 0
    for line in filter(None, map(str.strip, text.splitlines())):
        whole += len(line)
        again += len(line) * (line in seen)
        seen.add(line)
    return again / max(1, whole)


def compression(text: str) -> float:
    """How many times smaller zlib makes a text."""
    content = text.encode()
    return len(content) / len(zlib.compress(content, 1))
