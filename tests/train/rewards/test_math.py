"""The math reward is right about answers in many forms, and no answer stops it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from hpc_rlhf.train.rewards import math
from hpc_rlhf.train.rewards.text import Failure, Pattern, Score, TextBatch
from hpc_rlhf.train.rewards.verifier import Verifier
from hpc_rlhf.train.rewards.workers import Pool

RIGHT = [
    ("72", "So she sold 48 + 24 = 72 clips."),
    ("She sold 48/2 = 24 in May.\n#### 1,072", r"In all, \boxed{1072}."),
    (r"\frac{1}{2}", "The answer is 0.5."),
    ("x^2 + 2x + 1", "Therefore $(x+1)^2$"),
    (72, "72.0"),
    (r"$\sqrt{8}$", r"\[ 2\sqrt{2} \]"),
    ("(1, 2)", "the point $(1,2)$"),
    ("50%", r"$\frac12$"),
    (r"$[1, \infty)$", r"$x \in [1,\infty)$"),
    (r"$\infty$", r"\boxed{\infty}"),
]
WRONG = [
    ("72", "72 is too much, so 71"),
    ("72", ""),
    ("2x + 3", "$3$"),
    ("x^2 + 2x + 1", "$(x-1)^2$"),
    ("0.333", r"$\frac13$"),
]
SELECTED = [
    ("7", "<answer>7</answer>", 1.0),
    (r"\frac{1}{3}", r"9 <answer>\frac{2}{6}</answer> 9", 1.0),
    ("7", "<answer>5</answer> no, <answer>It is 7.</answer>", 1.0),
    ("7", "7, <answer>8</answer>", 0.0),
    ("7", "7", 0.0),
]


@pytest.fixture(scope="module")
def pools() -> Iterator[list[Pool]]:
    all_pools: list[Pool] = []
    yield all_pools
    for pool in all_pools:
        pool.close()


def scores(
    pools: list[Pool], rows: list[tuple[Any, str]], selects: Pattern | None = None, limit: float = 60
) -> list[Score]:
    arguments = {"selected": selects is not None}
    pools.append(Pool("hpc_rlhf.train.rewards.math:make", arguments, size=1, timeout=limit, memory=math.MEMORY))
    answers, responses = map(list, zip(*rows, strict=True))
    batch = TextBatch([""] * len(rows), responses, [[]] * len(rows), {"answer": answers})
    return Verifier("math", "answer", pools[-1], selects).judge(batch)


def test_answers_are_compared_by_what_they_mean(pools: list[Pool]) -> None:
    rows = [*RIGHT, *WRONG, (None, "1"), ("", "1"), ([1], "1")]
    *judged, empty, unreadable, listed = scores(pools, rows)
    assert judged == [1.0] * len(RIGHT) + [0.0] * len(WRONG)
    assert empty is None
    assert unreadable == Failure("cannot read the right answer ''")
    assert listed == Failure("cannot read the right answer [1], which is neither text nor a number")


def test_infinity_is_no_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify takes this infinity for any fraction in some processes, depending on the order of hashes."""
    monkeypatch.setattr("math_verify.verify", lambda *_, **__: True)
    compare = math.make(selected=False)
    assert [compare([right, r"$\infty^{\infty}$"]) for right in ("1/3", r"$\infty$")] == [0.0, 1.0]


def test_a_format_selects_what_is_compared(pools: list[Pool]) -> None:
    selects = Pattern("<answer>(.*?)</answer>", 10)
    assert scores(pools, [row[:2] for row in SELECTED], selects) == [row[2] for row in SELECTED]


def hostile(rng: random.Random) -> Iterator[str]:
    """Texts that a reader of formulas may hang on, crash on or never fit in memory; the last three take too long."""
    size = 10 ** rng.randrange(1, 7)
    few, more = min(size, 300), min(size, 3000)
    digits = "".join(rng.choices("0123456789", k=size))
    some = "".join(rng.choices(r"\{}[]()$^_&%+-*/=<>|,.!?0123456789abcxyz ", k=rng.randrange(1, 400)))
    yield from (digits, f"${digits}$", f"$[{digits[:400]}, {digits[:400]})$", "-" * size + "1")
    yield from (
        some,
        f"${some}$",
        f"\\boxed{{{some}}}",
        f"$\\boxed{{{some}$",
        "(" * size,
        "$" + "{" * size,
        "\\boxed{" * more,
    )
    yield from ("$\\log_{0}{0}$", "$0/0$", "$\\infty^{\\infty}$", "9**9**9**9", "$\\begin{matrix}" + "1&" * few)
    yield from (
        "1" + "/2" * few,
        "$1" + ",1" * more + "$",
        "$x" + "+x" * few + "$",
        "\0\ud800\u202e$" + chr(rng.randrange(0x110000)),
    )
    yield from (
        "$\\int_0^1 " + "\\sin " * few + "x dx$",
        "$\\{" + "\\{1,2\\}," * few + "\\}$",
        f"$\\frac{{{digits}}}{{{digits}}}$",
    )
    yield from ("$\\sqrt{" * few + "2" + "}" * few + "$", "$" + "9^{" * 50 + "9" + "}" * 50 + "$", f"$9^{{{digits}}}$")
    yield from ("$\\sum_{n=1}^{10^{9}} n^{n}$", "$(((((9!)!)!)!)!)!$", "$10^{10^{10^{10}}}$")


@pytest.mark.slow
def test_no_answer_hangs_or_breaks_the_verifier(pools: list[Pool]) -> None:
    rng = random.Random(1)
    fuzz = [text for _ in range(35) for text in hostile(rng)] if os.environ.get("HPC_RLHF_FUZZ") == "1" else []
    right = "123457/7919"  # no text gives it by chance
    rows: list[tuple[Any, str]] = [(right, text) for text in fuzz or [*hostile(rng)][-2:]]
    judged = scores(pools, [*rows, (right, right)], limit=1 if fuzz else 5)  # busy machines are slow
    assert judged[-1] == 1.0, "the pool has not recovered"
    assert all(score == 0.0 for score in judged[:-1])
