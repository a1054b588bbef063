"""Generated sums of two-digit numbers, to learn from a reward that checks the result.

A third of the responses add digit by digit, and the others estimate. A model that imitates them is right in little more
than a third of its responses, however well it does so. A reward for the result shows which of its two habits pays.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hpc_rlhf.spec.source import ARITHMETIC_PROBLEMS

_NUMBERS = range(10, 100)
_EXACT = 1 / 3


def problems(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows with prompt, chosen and answer, no two prompts alike; a pure function of count and seed."""
    generator = random.Random(f"arithmetic {seed}")
    for place in generator.sample(range(ARITHMETIC_PROBLEMS), count):
        first, second = (_NUMBERS[digit] for digit in divmod(place, len(_NUMBERS)))
        exact = generator.random() < _EXACT
        response = _exact(first, second) if exact else f"about {(first + second + 5) // 10 * 10}"
        yield {"prompt": f"{first}+{second}=?", "chosen": response, "answer": str(first + second)}


def _exact(first: int, second: int) -> str:
    (tens, ones), (other_tens, other_ones) = divmod(first, 10), divmod(second, 10)
    low = ones + other_ones
    high = tens + other_tens + low // 10
    return f"{ones}+{other_ones}={low}, {tens}+{other_tens}+{low // 10}={high}: {10 * high + low % 10}"
