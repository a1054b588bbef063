"""A reward function in a user's file, called as TRL calls it; in a worker process.

It is called with keywords: ``prompts``, ``completions`` (also as ``responses``) and ``completion_ids``, and the columns
of the data, each a list with an entry for each response. It gets those that its signature takes. It returns, or as an
async function awaits, a list of numbers, or None where it does not apply.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def load(file: str, name: str, seconds: float) -> Callable[[Mapping[str, Any]], list[float | None] | str]:
    """A callable that passes keywords to a function and returns its scores, or what it raised.

    Args:
        seconds: after which a call prints where it is.

    Raises:
        Exception: the file cannot be imported, or has no such function.
    """
    sys.dont_write_bytecode = True  # ranks would write it into the run directory at the same time
    faulthandler.enable()
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
        faulthandler.dump_traceback_later(seconds)
        try:
            scores = function(**arguments)
            if inspect.isawaitable(scores):
                scores = asyncio.run(_awaited(scores))
            return _numbers(scores)
        except (Exception, SystemExit) as error:
            _print(error)
            return f"raised {type(error).__name__}: {error}"[:1000] + _line(error, Path(file))
        finally:
            faulthandler.cancel_dump_traceback_later()
            if os.getpid() != own:  # the function forked; only its parent may answer
                os._exit(1)

    return call


async def _awaited(scores: Any) -> Any:
    return await scores


def _numbers(scores: Any) -> list[float | None] | str:
    """The scores as JSON takes them, or what the function returned instead."""
    if not isinstance(scores, Iterable) or isinstance(scores, (str, Mapping)):
        return f"returned {_shown(scores)}, not a list with a number for each response"
    numbers: list[float | None] = []
    for score in scores:
        try:
            numbers.append(None if score is None else float(score))
        except (TypeError, ValueError):
            return f"returned {_shown(score)} among its scores, which is not a number"
    return numbers


def _shown(value: Any) -> str:
    return repr(value)[:100]


def _print(error: BaseException) -> None:
    """Print a traceback that begins in the user's code."""
    here = error.__traceback__
    traceback.print_exception(type(error), error, here and here.tb_next)


def _line(error: BaseException, file: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" (line {lines[-1]} of {file.name})" if lines else ""
