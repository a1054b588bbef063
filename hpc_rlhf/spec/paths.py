"""Resolves the paths in a spec: `${VAR}`, `~`, and relative paths.

A relative path starts at the folder of the file that it is written in; one of `--set` or of standard input, at the
working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hpc_rlhf.errors import Problem
from hpc_rlhf.spec.stages import STAGE_KINDS
from hpc_rlhf.spec.yaml_source import Mark, Node

_Resolve = Callable[[str, Path], str]  # of a text, and the folder at which a relative path in it starts

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_FILE = re.compile(r".*\.(json|jsonl|csv|parquet|arrow|txt|gz|bz2|xz|zst)")
_IMAGE_FILE = re.compile(r".*\.(sif|sqsh|img)")


def resolve_paths(root: Node) -> tuple[Node, list[Problem]]:
    """The tree with all paths resolved, and the problems."""
    problems: list[Problem] = []
    for pattern, resolve in _PATHS:
        root = _rewrite(root, pattern, (), resolve, problems)
    return root, problems


def _rewrite(
    node: Node, pattern: tuple[str, ...], path: tuple[str, ...], resolve: _Resolve, problems: list[Problem]
) -> Node:
    """The node with every text that matches the pattern resolved; `*` matches any key or index."""
    if not pattern:
        if not isinstance(node.value, str) or not node.value or "\0" in node.value:
            return node  # the model reports it
        try:
            return replace(node, value=resolve(node.value, _base(node.mark)))
        except ValueError as error:
            problems.append(node.mark.problem(str(error), path=".".join(path)))
            return node
    step, rest = pattern[0], pattern[1:]
    if isinstance(node.value, dict):
        steps = [key for key in node.value if step in ("*", key)]
        new = {key: _rewrite(node.value[key], rest, (*path, key), resolve, problems) for key in steps}
        return replace(node, value={**node.value, **new}) if new else node
    if isinstance(node.value, list) and step == "*":
        items = [_rewrite(n, rest, (*path, str(i)), resolve, problems) for i, n in enumerate(node.value)]
        return replace(node, value=items)
    return node


def _base(mark: Mark) -> Path:
    """The folder at which relative paths that are written at this place start."""
    return Path(mark.source).absolute().parent if mark.line else Path.cwd()


def _absolute(text: str, base: Path) -> str:
    return os.path.abspath(base / text)


def _run_dir(text: str, base: Path) -> str:
    text = _expand(text)
    path, before = _absolute(text, base), os.path.abspath(text)
    # Earlier versions began at the working directory. Do not train from scratch what they have trained.
    if path != before and os.path.exists(f"{before}/job.yaml") and not os.path.exists(path):
        raise ValueError(
            f"is {path} now, because relative paths start at the folder of their file; an earlier run is in {before}: "
            "write that path"
        )
    return path


def _expand(text: str) -> str:
    """The text with variables and a leading `~` expanded."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        expanded = os.environ.get(name) or default
        if expanded is None:
            raise ValueError(f"the variable {name} is not set; set it, or write a default: ${{{name}:-default}}")
        return expanded

    if "$" in _VARIABLE.sub("", text):
        raise ValueError(f"{text!r} contains a $ that is not ${{NAME}} or ${{NAME:-default}}")
    text = _VARIABLE.sub(value, text)
    return os.path.expanduser(text) if text.startswith("~") else text


def _is_local(text: str) -> bool:
    """Whether the text is written as a path rather than a hub id."""
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def _local_or_hub(text: str, base: Path) -> str:
    """The absolute path of a local file or folder, or a hub id unchanged.

    A folder with the name of a hub id is neither taken, because it may be another user's, nor passed over in silence.
    """
    text = _expand(text)
    if _HUB_ID.fullmatch(text) and not _FILE.fullmatch(text):
        # Earlier versions looked in the working directory. The spec of a run has full paths.
        places = [base] if (base / "plan.json").exists() else [base, Path.cwd()]
        if folder := next((place / text for place in places if os.path.isdir(place / text)), None):
            here = f"./{text}" if folder.parent == base / Path(text).parent else str(folder)
            raise ValueError(
                f"{text!r} is a hub id, but there is also the folder {folder}: for the folder, write {here}; for the "
                "model or data set of the hub, rename the folder"
            )
        return text
    path = _absolute(text, base)
    if os.path.exists(path):
        return path
    if _is_local(text) or _FILE.fullmatch(text):
        raise ValueError(f"there is no file or folder {path!r}")
    raise ValueError(f"{text!r} is neither an existing file or folder nor a hub id such as facebook/opt-1.3b")


def _run(text: str, base: Path) -> str:
    path = _absolute(_expand(text), base)
    if not os.path.isfile(f"{path}/job.yaml"):
        raise ValueError(f"there is no run directory {path!r}")
    return path


def _reward_model(text: str, base: Path) -> str:
    return text if text == "reward" else _local_or_hub(text, base)


def _image(text: str, base: Path) -> str:
    text = _expand(text)
    return _absolute(text, base) if _is_local(text) or _IMAGE_FILE.fullmatch(text) else text


def _sandbox(text: str, base: Path) -> str:
    text = _expand(text)
    return text if "://" in text else _absolute(text, base)


def _mount(text: str, base: Path) -> str:
    source, colon, target = _expand(text).partition(":")
    return _absolute(source, base) + colon + target


def _function(text: str, base: Path) -> str:
    file, colon, name = _expand(text).rpartition(":")
    return _absolute(file, base) + colon + name if file else text


def _program(text: str, base: Path) -> str:
    return _absolute(_expand(text), base)


def _webhook(text: str, base: Path) -> str:
    """The file with the address. A variable stays as it is, because its value is a secret."""
    return text if "$" in text or "://" in text else _absolute(os.path.expanduser(text), base)


_PATHS: tuple[tuple[tuple[str, ...], _Resolve], ...] = (
    (("run_dir",), _run_dir),
    (("follows",), _run),
    (("data", "sources", "*", "path"), _local_or_hub),
    (("data", "sources", "*", "feedback"), _run),
    *(
        (("stages", kind.name, field, *several, "path"), _local_or_hub)
        for kind in STAGE_KINDS
        for field in kind.sources
        for several in ((), ("*",))
    ),
    (("models", "*"), _local_or_hub),
    (("stages", "*", "rewards", "*", "function"), _function),
    (("notify", "webhook", "url"), _webhook),
    (("slurm", "container", "image"), _image),
    (("slurm", "container", "mounts", "*"), _mount),
    (("stages", "*", "rewards", "*", "image"), _sandbox),
    (("stages", "*", "rewards", "*", "model"), _reward_model),
    (("stages", "*", "rollout", "python"), _program),
    (("stages", "*", "slurm", "container", "image"), _image),
    (("stages", "*", "slurm", "container", "mounts", "*"), _mount),
)
