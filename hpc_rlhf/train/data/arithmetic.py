"""Generated sums and differences of two-digit numbers, with responses that calculate digit by digit."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hpc_rlhf.spec.source import ARITHMETIC_PROBLEMS

_NUMBERS = range(10, 100)


def problems(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows with prompt, chosen and answer, no two alike; a pure function of count and seed."""
    for place in random.Random(f"arithmetic {seed}").sample(range(ARITHMETIC_PROBLEMS), count):
        rest, sign = divmod(place, 2)
        first, second = (_NUMBERS[digit] for digit in divmod(rest, len(_NUMBERS)))
        answer = first - second if sign else first + second
        steps = _difference(max(first, second), min(first, second)) if sign else _sum(first, second)
        prompt = f"{first}{'-' if sign else '+'}{second}=?"
        yield {"prompt": prompt, "chosen": f"{steps}: {answer}", "answer": str(answer)}


def _sum(first: int, second: int) -> str:
    (tens, ones), (other_tens, other_ones) = divmod(first, 10), divmod(second, 10)
    low = ones + other_ones
    carried = low // 10
    return f"{ones}+{other_ones}={low:02}, {tens}+{other_tens}+{carried}={tens + other_tens + carried}"


def _difference(first: int, second: int) -> str:
    (tens, ones), (other_tens, other_ones) = divmod(first, 10), divmod(second, 10)
    borrowed = int(ones < other_ones)
    low, high = ones - other_ones + 10 * borrowed, tens - other_tens - borrowed
    return f"{ones}-{other_ones}={low}, {tens}-{other_tens}-{borrowed}={high}"
