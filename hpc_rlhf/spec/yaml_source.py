"""Parses YAML into nodes with places. A stricter and safer `yaml.safe_load`.

The differences: a duplicate key is an error; `1e-4` is a number; dates and numbers in unusual notations (`0123`,
`0x1f`, `1_000`, `12:00:00`) are text; keys must be text; size, depth and expansion of aliases are limited.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer

from hpc_rlhf.errors import Problem, SpecError

STDIN = Path("-")  # the name of standard input
MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
MAX_DEPTH = 40

# The C parser is ten times as fast and reports the same places. Its composer overflows on deep nesting.
_BASES: Any = (Composer, yaml.CSafeLoader) if yaml.__with_libyaml__ else (yaml.SafeLoader,)

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(yes|no|true|false|on|off)\Z", re.IGNORECASE)
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})\Z")
FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?|\.inf)\Z")
_TRUE = ("yes", "true", "on")
_TAG = "tag:yaml.org,2002:"
_PLAIN = "plain"  # our tag of a scalar without quotes and without a tag
_COLLECTIONS = (_TAG + "map", _TAG + "seq")

# Likely causes of the parser's messages.
_YAML_HINTS = {
    "cannot start any token": "indent with spaces, not tabs; quote text that starts with a special character",
    "tab character": "indent with spaces, not tabs",
    "mapping values are not allowed": "indent fields alike; quote text with a colon and a space",
    "did not find expected key": "indent the fields of a mapping alike",
    "second occurrence": "give every anchor a name of its own",
    "found another document": "a job spec is one document: remove `---`",
}

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Mark:
    """A place: a file with line and column from 1, or a `--set` option without them."""

    source: str
    line: int = 0
    column: int = 0

    def problem(self, what: str, hint: str | None = None, path: str = "") -> Problem:
        return Problem(self.source, self.line, self.column, path, what, hint)

    def at(self, line: int, column: int) -> Mark:
        """A place in this file, by line and column from 0; an option has no others."""
        return Mark(self.source, line + 1, column + 1) if self.line else self


@dataclass(frozen=True)
class Node:
    """A value of a spec and its place.

    Attributes:
        value: a scalar, a dict of nodes or a list of nodes.
        mark: place of the value.
        key: place of its key, if it is in a mapping.
        height: levels of the tree, with aliases expanded.
    """

    value: Scalar | dict[str, Node] | list[Node]
    mark: Mark
    key: Mark | None = None
    height: int = field(default=1, repr=False)

    @classmethod
    def of(cls, plain: Any) -> Node:
        """The nodes of plain values, which have no places."""
        if isinstance(plain, dict):
            return Node({key: Node.of(value) for key, value in plain.items()}, Mark(""))
        return Node([*map(Node.of, plain)] if isinstance(plain, list) else plain, Mark(""))

    def plain(self) -> Any:
        """The value without places; sequences become tuples, as in the models."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return tuple(node.plain() for node in self.value)
        return self.value

    @property
    def place(self) -> Mark:
        """The place of its key, or of its value if it has none."""
        return self.key or self.mark

    @property
    def fields(self) -> dict[str, Node]:
        """The fields of a mapping; any other value has none."""
        return self.value if isinstance(self.value, dict) else {}

    def inner(self, key: str) -> Node | None:
        """The field of a mapping, or the item of a list with this number."""
        if isinstance(self.value, list):
            return self.value[int(key)] if key.isdecimal() and int(key) < len(self.value) else None
        return self.fields.get(key)

    def get(self, *path: str) -> Node | None:
        """The node at a path of keys of mappings and numbers of lists."""
        node: Node | None = self
        for key in path:
            node = node.inner(key) if node is not None else None
        return node

    def is_set(self, *path: str) -> bool:
        """Whether the node at a path exists and is not null."""
        node = self.get(*path)
        return node is not None and node.value is not None


@cache
def _read_once(path: Path) -> bytes:
    """Standard input or a pipe, which can be read only once; up to a byte more than a spec may have."""
    if path == STDIN:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def read_yaml(path: Path, shown: str) -> Node:
    """Read a file that contains a mapping, or standard input for `-`. Messages call it `shown`.

    Raises:
        SpecError: the file cannot be read, or is not such YAML.
    """
    mark, start = Mark(shown), Mark(shown, 1, 1)
    try:
        if path == STDIN or not path.is_file():
            raw = _read_once(path)
        else:
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError([mark.problem(f"cannot read it: {error.strerror}")]) from error
    except ValueError as error:  # a NUL in the name
        raise SpecError([mark.problem(f"cannot read it: {error}")]) from error
    if len(raw) > MAX_BYTES:
        raise SpecError([mark.problem(f"is larger than {MAX_BYTES >> 20} MiB, too large for a job spec")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start)
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
        raise SpecError([start.at(line, column).problem("is not UTF-8 text")]) from error
    node = parse_yaml(text, start)
    if node.value is None:
        raise SpecError([mark.problem("is empty", "`hpc-rlhf init` writes a spec to start from")])
    if not isinstance(node.value, dict):
        raise SpecError([node.mark.problem("must be a mapping, with top-level fields such as `name: my-run`")])
    return node


def parse_yaml(text: str, origin: Mark) -> Node:
    """Parse one YAML document. Places are relative to `origin`, or equal to it if it has no line."""
    if bad := _UNPRINTABLE.search(text):
        line = text.count("\n", 0, bad.start())
        column = bad.start() - (text.rfind("\n", 0, bad.start()) + 1)
        raise SpecError([origin.at(line, column).problem(f"contains the control character {bad.group()!a}")])
    try:
        node = yaml.compose(text, Loader=_Loader)
        return Node(None, origin) if node is None else _Converter(origin).convert(node)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        place = origin if at is None else origin.at(at.line, at.column)
        what = error.problem or error.context or "it does not parse"
        if isinstance(error, _Refused):
            raise SpecError([place.problem(what, error.note)]) from error
        hint = next((hint for words, hint in _YAML_HINTS.items() if words in what), None)
        raise SpecError([place.problem(f"is not YAML: {what}", hint)]) from error


class _Refused(yaml.MarkedYAMLError):
    """YAML that is not allowed in a job spec."""

    def __init__(self, at: Any, what: str, hint: str | None = None) -> None:
        super().__init__(problem=what, problem_mark=at.start_mark, note=hint)


class _Loader(*_BASES):  # type: ignore[misc]
    """PyYAML's safe loader with two changes: depth is bounded, and an alias has its own place."""

    def __init__(self, text: str) -> None:
        _BASES[-1].__init__(self, text)
        Composer.__init__(self)
        self._around: list[str | None] = []  # the anchors of the nodes around the current one

    def resolve(self, kind: type, value: str | None, implicit: Sequence[bool]) -> object:
        return _PLAIN if kind is yaml.ScalarNode and implicit[0] else super().resolve(kind, value, implicit)

    def compose_node(self, parent: object, index: object) -> yaml.Node:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self._around:
            raise _Refused(event, f"the alias *{event.anchor} is inside its own value")
        if len(self._around) == MAX_DEPTH:
            raise _Refused(event, f"is nested more than {MAX_DEPTH} levels deep")
        self._around.append(event.anchor)
        node: yaml.Node = super().compose_node(parent, index)
        self._around.pop()
        if isinstance(event, yaml.AliasEvent):
            node = copy(node)
            node.start_mark = event.start_mark
        return node


class _Converter:
    """Turns PyYAML's nodes into ours. A value counts each time that an alias repeats it."""

    def __init__(self, origin: Mark) -> None:
        self._origin = origin
        self._count = 0
        self._converted: dict[int, tuple[Node, int]] = {}  # collections by id, with the number of their values

    def convert(self, node: yaml.Node) -> Node:
        known = self._converted.get(id(node.value))
        before = self._count
        self._count += known[1] if known else 1
        if self._count > MAX_VALUES:
            raise _Refused(node, f"contains more than {MAX_VALUES} values with aliases expanded")
        if known:
            return known[0]
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node), self._mark(node))
        if node.tag not in _COLLECTIONS:
            raise _Refused(node, f"the tag {_short(node.tag)} is not allowed in a job spec")
        value = self._mapping(node) if isinstance(node, yaml.MappingNode) else [*map(self.convert, node.value)]
        below = value.values() if isinstance(value, dict) else value
        height = 1 + max((each.height for each in below), default=0)
        if height > MAX_DEPTH:
            raise _Refused(node, f"is nested more than {MAX_DEPTH} levels deep with aliases expanded")
        converted = Node(value, self._mark(node), height=height)
        self._converted[id(node.value)] = converted, self._count - before
        return converted

    def _mapping(self, node: yaml.Node) -> dict[str, Node]:
        fields: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise _Refused(key_node, "a key must be text", "put it in quotes")
            value = replace(self.convert(value_node), key=self._mark(key_node))
            if key == "<<" and key_node.tag == _PLAIN:
                merged = self._merge(value, key_node) | merged
                continue
            if key in fields:
                first = fields[key].key
                hint = f"first at line {first.line}" if first and first.line else None
                raise _Refused(key_node, f"the key {key!r} was already given", hint)
            fields[key] = value
        return merged | fields

    def _merge(self, value: Node, key_node: yaml.Node) -> dict[str, Node]:
        """The fields merged by `<<: *base` or `<<: [*first, *second]`; earlier ones win."""
        fields: dict[str, Node] = {}
        for node in value.value if isinstance(value.value, list) else [value]:
            if not isinstance(node.value, dict):
                raise _Refused(key_node, "`<<` takes an alias of a mapping, or a list of them")
            fields = node.value | fields
        return fields

    def _scalar(self, node: yaml.Node) -> Scalar:
        if node.tag == _PLAIN:
            return _plain_scalar(node.value)
        if node.tag != _TAG + "str":
            raise _Refused(node, f"the tag {_short(node.tag)} is not allowed in a job spec")
        return str(node.value)

    def _mark(self, node: yaml.Node) -> Mark:
        return self._origin.at(node.start_mark.line, node.start_mark.column)


def _plain_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() in _TRUE
    if _INT.match(text):
        return int(text)
    if FLOAT.match(text):
        return float(text.replace(".inf", "inf"))
    return text


def _short(tag: str) -> str:
    return "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag
