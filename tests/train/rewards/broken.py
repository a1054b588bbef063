"""Reward functions that are broken in ten ways, and some that work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any


def works(prompts: list[str], completions: list[str], answer: list[Any]) -> list[float | None]:
    return [None if a is None else float(c.strip() == str(a)) for c, a in zip(completions, answer, strict=True)]


async def awaits(responses: list[str], **columns: Any) -> list[float]:
    import asyncio

    lengths = await asyncio.gather(*(asyncio.sleep(0.01, len(response)) for response in responses))
    return [float(length) for length in lengths]


def everything(**keywords: Any) -> list[float]:
    print(sorted(keywords))
    assert keywords["completions"] == keywords["responses"]
    return [float(len(ids)) for ids in keywords["completion_ids"]]


def raises(completions: list[str], **columns: Any) -> list[float]:
    """Scores a response by how many it was asked about, and raises at one that is empty."""
    for completion in completions:
        if not completion:
            raise KeyError("empty")
    return [float(len(completions)) for _ in completions]


def hangs(completions: list[str]) -> list[float]:
    while True:
        time.sleep(1)


def nothing(completions: list[str]) -> list[float | None]:
    return [None for _ in completions]


def too_few(completions: list[str]) -> list[float]:
    return [1.0]


def not_a_number(completions: list[str]) -> list[float]:
    return [float("nan") if row == 1 else 1.0 for row, _ in enumerate(completions)]


def prints(completions: list[str]) -> list[float]:
    for _ in range(3000):
        print("x" * 1000)
    os.write(1, b"y" * 1000000)
    return [1.0 for _ in completions]


def forks(completions: list[str]) -> list[float]:
    """Returns in two processes, and leaves one behind that has a session of its own."""
    if os.fork() == 0:
        return [2.0 for _ in completions]
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", MARK], start_new_session=True)
    return [1.0 for _ in completions]


def exits(completions: list[str]) -> list[float]:
    print("no key for the judge")
    os._exit(3)


def leaves(completions: list[str]) -> list[float]:
    sys.exit("no key for the judge")


def crashes(completions: list[str]) -> list[float]:
    import ctypes

    return [float(ctypes.string_at(0)[0]) for _ in completions]


def only_together(completions: list[str]) -> list[float]:
    return [float(len(completions) == 1 or 1 / 0) for _ in completions]


def forgets_to_return(completions: list[str]) -> None:
    pass


def words(completions: list[str]) -> list[Any]:
    return ["good" for _ in completions]


def needs_package(completions: list[str]) -> list[float]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]

    return [a_package_that_nobody_has.score(completion) for completion in completions]


def wrong_signature(text: str, completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]


MARK = os.environ.get("MARK", "")
