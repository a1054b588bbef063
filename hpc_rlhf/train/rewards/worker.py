"""A process of ``workers.Pool``: applies a function to what it reads, line by line."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from importlib import import_module
from typing import Any

from hpc_rlhf.train.runtime import keeper


def main() -> None:
    """Arguments: ``module:name`` of what makes the function, its keyword arguments and the limit of memory, both as
    JSON, and the file descriptor for answers.

    The first answer reports whether the function could be made. Each is an object with a value or an error.
    """
    make, arguments, memory, answers = sys.argv[1:]
    keeper.continue_in_child(int(answers))
    # What the function prints must not reach the answers, and what it reads must not be the questions.
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.set_inheritable(int(answers), False)
    with os.fdopen(int(answers), "w", encoding="utf-8") as file:

        def answer(**outcome: Any) -> None:
            file.write(json.dumps(outcome) + "\n")
            file.flush()

        try:
            module, _, name = make.partition(":")
            apply = getattr(import_module(module), name)(**json.loads(arguments))
            _limit_memory(json.loads(memory))
        except BaseException as error:
            answer(error=_describe(error))
            return
        answer(value=None)
        for line in questions:
            try:
                item = json.loads(line)
                value = None if item is None else apply(item)
                json.dumps(value)
            except BaseException as error:
                traceback.print_exc()
                answer(error=_describe(error))
                continue
            answer(value=value)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())[:1000]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _limit_memory(further: int | None) -> None:
    """Limit the address space to its present size plus ``further`` bytes; None sets no limit."""
    if further is not None:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + further
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
