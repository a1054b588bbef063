"""The Python files with reward functions: their digests, and the columns that the functions need.

Nothing in them runs here. The functions are called as TRL calls reward functions, with keyword arguments.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from pathlib import Path

from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.rewards import RewardItem

# What a function may take besides columns of the data.
KEYWORDS = ("prompts", "completions", "responses", "completion_ids")
# What other libraries' functions take for one response alone. No column of the data reaches rewards as prompt.
_SINGLE = {"prompt": "prompts"}


class FunctionError(Exception):
    """A function that cannot be called: what is wrong, and what to do."""


def split(function: str) -> tuple[Path, str]:
    """The file and the name in ``rewards.py:score``."""
    file, _, name = function.rpartition(":")
    return Path(file), name


def with_files(spec: JobSpec, place: Callable[[Path], str]) -> JobSpec:
    """The spec with its reward functions' files at other paths."""

    def moved(item: RewardItem) -> RewardItem:
        if item.function is None:
            return item
        file, name = split(item.function)
        return item.model_copy(update={"function": f"{place(file)}:{name}"})

    return spec.with_stages(**{stage: {"rewards": tuple(map(moved, items))} for stage, items in spec.rewards.items()})


def by_content(spec: JobSpec) -> JobSpec:
    """The spec with paths that depend only on the files' names and content: a run has its own copies."""
    return with_files(spec, lambda file: f"{digest(file)}/{file.name}")


def digest(file: Path) -> str:
    """The start of the SHA-256 of a file; "missing" without it."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    except OSError:
        return "missing"


def needed_columns(function: str) -> set[str]:
    """The columns of the data that a function cannot be called without.

    Raises:
        FunctionError: there is no such function, or it cannot be called with keyword arguments.
    """
    file, name = split(function)
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except OSError as error:
        hint = "correct the path, which starts at the folder of the spec if it is relative, or write the file"
        raise FunctionError(f"cannot read {file}: {error.strerror}", hint) from None
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        what = f"{file} is not Python{line}: {error.args[0]}"
        raise FunctionError(what, f"see the whole error with: python -m py_compile {file}") from None
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    node = next((node for node in reversed(defined) if node.name == name), None)
    if node is None:
        if not _may_bind(tree, name):
            there = ", ".join(node.name for node in defined) or "no function"
            hint = f"name one that is there, or write def {name}(completions, **columns)"
            raise FunctionError(f"{file} has no function {name}; it has {there}", hint)
        return set()
    return set() if node.decorator_list else _required(node) - set(KEYWORDS)


def _may_bind(tree: ast.Module, name: str) -> bool:
    """Whether anything but a plain function may give the name a value."""
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = {node.id}
        else:
            bound = {node.name} if isinstance(node, named) else set()
        if bound & {name, "*"}:
            return True
    return False


def _required(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The parameters without a default.

    Raises:
        FunctionError: one of them cannot be passed by keyword or is never passed, or nothing takes the responses.
    """
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    required = positional[: len(positional) - len(args.defaults)]
    if only := [arg.arg for arg in required if arg in args.posonlyargs]:
        what = f"{node.name} takes {only[0]} by position only; it is called with keyword arguments"
        raise FunctionError(what, "remove the / from its parameters")
    names = {arg.arg for arg in [*positional, *args.kwonlyargs]}
    if args.kwarg is None and not names & {"completions", "responses", "completion_ids"}:
        what = f"it takes {', '.join(sorted(names))}" if names else "it takes nothing"
        what = f"{node.name} needs a parameter completions, or **kwargs, for the responses; {what}"
        raise FunctionError(what, f"such as def {node.name}(completions, **columns)")
    keyword = {arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None}
    needed = {arg.arg for arg in required} | keyword
    if single := needed & _SINGLE.keys():
        name = min(single)
        what = f"{node.name} takes {name}, but a function is called with lists for all responses together"
        raise FunctionError(what, f"name the parameter {_SINGLE[name]}, and expect a list")
    return needed
