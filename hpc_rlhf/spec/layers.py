"""Merges the layers of a spec: the file that it `extends`, the file itself, then each `--set`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpc_rlhf.errors import Problem, SpecError
from hpc_rlhf.spec.yaml_source import Mark, Node, parse_yaml, read_yaml

EXTENDS = "extends"


def read_layers(path: Path, sets: Sequence[str]) -> Node:
    """The merged tree of a spec file, what it extends and the `--set` options. Nodes keep their places.

    Raises:
        SpecError: a file cannot be read, or an option cannot be applied.
    """
    root = _read_chain(path, str(path), ())
    problems: list[Problem] = []
    for option in sets:
        try:
            root = _apply(root, option)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return root


def files(path: Path) -> list[Path]:
    """A spec file that can be read, and those that it extends, in order."""
    base = read_yaml(path, str(path)).get(EXTENDS)
    return [path] if base is None else [path, *files(path.parent / str(base.value))]


def _read_chain(path: Path, shown: str, above: tuple[Path, ...]) -> Node:
    """A file merged over the one that it extends, recursively."""
    root = read_yaml(path, shown)
    base = root.get(EXTENDS)
    if base is None:
        return root
    if not isinstance(base.value, str) or not base.value:
        raise SpecError([base.mark.problem("must be the name of a file", path=EXTENDS)])
    below = path.parent / base.value
    if not os.path.isfile(below):  # unlike Path.is_file, false for any name that cannot be one
        hint = f"it is looked for in the folder of {shown}"
        raise SpecError([base.mark.problem(f"there is no file {base.value!r}", hint, path=EXTENDS)])
    chain = (*above, path.resolve())
    if below.resolve() in chain:
        raise SpecError([base.mark.problem(f"{base.value!r} extends this file again", path=EXTENDS)])
    own = {key: node for key, node in root.fields.items() if key != EXTENDS}
    return _merge(_read_chain(below, str(below), chain), replace(root, value=own))


def _merge(base: Node, over: Node) -> Node:
    """Merge mappings and replace everything else."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    fields = dict(base.value)
    for key, node in over.value.items():
        fields[key] = _merge(fields[key], node) if key in fields else node
    return replace(over, value=fields)


def _apply(root: Node, option: str) -> Node:
    """The tree with one `a.b.c=VALUE` applied."""
    name, equals, text = option.partition("=")
    mark = Mark(f"--set {name}")
    keys = name.split(".")
    if not equals or not all(keys):
        raise SpecError([mark.problem("does not have the form a.b.c=VALUE", "such as --set stages.ppo.epochs=2")])
    return put(root, keys, parse_yaml(text, mark), mark)


def put(node: Node | None, keys: Sequence[str], value: Node, mark: Mark) -> Node:
    """The node with a value at a path below it. Missing and empty mappings on the way are created."""
    if not keys:
        return replace(value, key=mark)
    key, rest = keys[0], keys[1:]
    if node is None or node.value is None:
        return Node({key: put(None, rest, value, mark)}, mark, key=mark)
    if isinstance(node.value, dict):
        return replace(node, value={**node.value, key: put(node.value.get(key), rest, value, mark)})
    if isinstance(node.value, list):
        last = len(node.value) - 1
        if not key.isdecimal() or len(key) > 9 or int(key) > last:
            raise SpecError([mark.problem(f"{key!r} is not an index of this list", f"valid ones are 0 to {last}")])
        items = list(node.value)
        items[int(key)] = put(items[int(key)], rest, value, mark)
        return replace(node, value=items)
    raise SpecError([mark.problem(f"there is no {key!r} in {node.value!r}, which is not a mapping")])
