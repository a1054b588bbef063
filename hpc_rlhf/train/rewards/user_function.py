"""A reward function in a user's file, called as TRL calls it; in a worker process.

It is called with keywords: ``prompts``, ``completions`` (also as ``responses``) and ``completion_ids``, and the columns
of the data, each a list with an entry for each response. It gets those that its signature takes. It returns, or as an
async function awaits, a list of numbers, or None where it does not apply.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Bytes of what a function prints that a worker passes on, in all.
_PRINTED = 64 * 1024


def load(file: str, name: str) -> Callable[[Mapping[str, Any]], list[float | None] | str]:
    """What calls a function with keywords, and returns its scores, or what it raised.

    Raises:
        Exception: the file cannot be imported, or has no such function.
    """
    output = _Output()
    sys.dont_write_bytecode = True  # ranks would write it into the run directory at the same time
    with output.captured():
        spec = importlib.util.spec_from_file_location("hpc_rlhf_reward", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickle look there
        spec.loader.exec_module(module)
        function = getattr(module, name)
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    own = os.getpid()

    def call(keywords: Mapping[str, Any]) -> list[float | None] | str:
        arguments = {key: value for key, value in keywords.items() if takes_all or key in names}
        try:
            with output.captured():
                try:
                    scores = function(**arguments)
                    if inspect.isawaitable(scores):
                        scores = asyncio.run(_awaited(scores))
                    return [None if score is None else float(score) for score in scores]
                except Exception as error:
                    traceback.print_exc()
                    return f"raised {type(error).__name__}: {error}"[:1000] + _line(error, Path(file))
        finally:
            if os.getpid() != own:  # a fork of the function's, which must not answer, too
                os._exit(1)

    return call


async def _awaited(scores: Any) -> Any:
    return await scores


def _line(error: BaseException, file: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" (line {lines[-1]} of {file.name})" if lines else ""


class _Output:
    """What code prints, passed on to this process's standard error until it is too much for a log."""

    def __init__(self) -> None:
        self._left = _PRINTED

    @contextmanager
    def captured(self) -> Iterator[None]:
        sys.stdout.flush()
        before = os.dup(1), os.dup(2)
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for number, copy in enumerate(before, 1):
                    os.dup2(copy, number)
                    os.close(copy)
                self._pass_on(file.fileno())

    def _pass_on(self, file: int) -> None:
        printed = os.pread(file, self._left + 1, 0)
        if printed and self._left:
            end = (
                b"" if len(printed) <= self._left else b"\nhpc-rlhf: what the reward prints from here on is left out\n"
            )
            os.write(2, printed[: self._left] + end)
            self._left = max(0, self._left - len(printed))
