"""Verifies mathematical answers with math-verify, in a process without torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

# Memory for reading and comparing two answers, in bytes.
MEMORY = 2 * 2**30
# What marks a formula.
_MARKS = ("$", "\\boxed", "\\(", "\\[")


def make(selected: bool) -> Callable[[list[Any]], float | str]:
    """Make the function of a ``Verifier``, which returns 1 if a response's last answer equals the right one, else 0.

    Args:
        selected: a format has selected the answer from each response: a formula, or a sentence with one.
    """
    from math_verify import parse, verify
    from sympy import nan, oo, zoo

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs each answer that it cannot read

    # The pool limits the time. math-verify does so by an exception in a signal handler, which its parsers may catch.
    @lru_cache(maxsize=1024)
    def read_formula(text: str) -> list[Any]:
        formula: list[Any] = parse(text if any(m in text for m in _MARKS) else f"${text}$", parsing_timeout=None)
        return formula

    def is_infinite(formula: list[Any]) -> bool:
        return any(hasattr(each, "has") and each.has(oo, -oo, zoo, nan) for each in formula)

    def is_right(right: list[Any], answer: list[Any]) -> bool:
        if is_infinite(answer) and not is_infinite(right):
            return False  # math-verify at times takes infinity to the power of infinity for any fraction
        return bool(verify(right, answer, timeout_seconds=None))

    def compare(item: list[Any]) -> float | str:
        answer, response = item
        if not isinstance(answer, str | int | float):
            return f"cannot read the right answer {answer!r}, which is neither text nor a number"
        right = read_formula(str(answer).rpartition("####")[2].strip())  # GSM8K's answers begin with their derivation
        if not right:
            return f"cannot read the right answer {answer!r}"
        answers = [parse(response, parsing_timeout=None)]
        if selected:
            answers.append(read_formula(response.strip()))
        return float(any(is_right(right, each) for each in answers))

    return compare
