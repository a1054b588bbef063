"""YAML text to a tree of nodes that know their place, with the semantics of `yaml.safe_load`, made safer.

The differences: a duplicate key is an error; `1e-4` is a number; what has another face than its number (`0123`,
`0x1f`, `1_000`, `12:00:00`) and dates are text; keys are text; and what could blow up (aliases of aliases,
depth, size) is bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from hpc_rlhf.errors import Problem, SpecError

MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
MAX_DEPTH = 40

# The C parser is ten times as fast and reports the same places.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(yes|no|true|false|on|off)\Z", re.IGNORECASE)
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})\Z")
FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?|\.inf)\Z"
)
_TRUE = ("yes", "true", "on")
_TAG = "tag:yaml.org,2002:"

# What a mistake that the parser words in its own terms mostly is.
_YAML_HINTS = {
    "cannot start any token": "indent with spaces, not tabs; quote text that starts with a special character",
    "tab character": "indent with spaces, not tabs",
    "mapping values are not allowed": "indent the fields of a mapping alike; quote text that holds a colon and a space",
    "did not find expected key": "indent the fields of a mapping alike",
}

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Mark:
    """A place: a file with line and column from 1, or a `--set` with neither."""

    source: str
    line: int = 0
    column: int = 0

    def problem(self, what: str, hint: str | None = None, path: str = "") -> Problem:
        return Problem(self.source, self.line, self.column, path, what, hint)


@dataclass(frozen=True)
class Node:
    """A value of a spec and where it was written.

    Attributes:
        value: a scalar, a dict of nodes or a list of nodes.
        mark: where the value starts.
        key: where its key is written, for a value in a mapping.
        height: levels of the tree, aliases followed.
    """

    value: Scalar | dict[str, Node] | list[Node]
    mark: Mark
    key: Mark | None = None
    height: int = field(default=1, repr=False)

    def plain(self) -> Any:
        """The value without places; sequences become tuples, as the models hold them."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return tuple(node.plain() for node in self.value)
        return self.value

    def get(self, *path: str) -> Node | None:
        """The node at a path of mapping keys."""
        node: Node | None = self
        for key in path:
            node = node.value.get(key) if node is not None and isinstance(node.value, dict) else None
        return node


def read_yaml(path: Path, shown: str) -> Node:
    """Read a file whose top is a mapping.

    Args:
        path: the file.
        shown: its name in messages.

    Raises:
        SpecError: it cannot be read, or is no such YAML.
    """
    mark = Mark(shown)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError([mark.problem(f"cannot read it: {error.strerror}")]) from error
    except ValueError as error:  # a NUL in the name
        raise SpecError([mark.problem(f"cannot read it: {error}")]) from error
    if len(raw) > MAX_BYTES:
        raise SpecError([mark.problem(f"is larger than {MAX_BYTES >> 20} MiB; a job spec is not")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise SpecError([Mark(shown, line, column).problem("is not UTF-8 text")]) from error
    node = parse_yaml(text, Mark(shown, 1, 1))
    if node.value is None:
        raise SpecError([mark.problem("is empty", "`hpc-rlhf init` writes a spec to start from")])
    if not isinstance(node.value, dict):
        raise SpecError(
            [node.mark.problem("must be a mapping, with fields such as `name: my-run` at its top")]
        )
    return node


def parse_yaml(text: str, origin: Mark) -> Node:
    """Parse one YAML document; places are relative to `origin`, or all `origin` when it has no line."""
    if bad := _UNPRINTABLE.search(text):
        line = text.count("\n", 0, bad.start())
        column = bad.start() - (text.rfind("\n", 0, bad.start()) + 1)
        place = replace(origin, line=line + 1, column=column + 1) if origin.line else origin
        raise SpecError([place.problem(f"holds the control character {bad.group()!a}")])
    try:
        return _Builder(text, origin).document()
    except yaml.MarkedYAMLError as error:
        place = origin
        if origin.line and error.problem_mark is not None:
            place = replace(origin, line=error.problem_mark.line + 1, column=error.problem_mark.column + 1)
        what = error.problem or error.context or "it does not parse"
        hint = next((hint for words, hint in _YAML_HINTS.items() if words in what), None)
        raise SpecError([place.problem(f"is not YAML: {what}", hint)]) from error


class _Builder:
    """Builds nodes from the parser's events, one document deep first."""

    def __init__(self, text: str, origin: Mark) -> None:
        self._loader = _Loader(text)
        self._origin = origin
        self._count = 0  # values so far, aliases followed
        # Each anchored value and how many values it holds; None while it is still being read.
        self._anchors: dict[str, tuple[Node, int] | None] = {}

    def document(self) -> Node:
        self._loader.get_event()  # stream start
        if isinstance(self._loader.get_event(), yaml.StreamEndEvent):
            return Node(None, self._origin)
        node = self._node(self._loader.get_event(), 1)
        self._loader.get_event()  # document end
        extra = self._loader.get_event()
        if not isinstance(extra, yaml.StreamEndEvent):
            raise self._error(
                extra, "a second document starts here", "a job spec is one document: remove `---`"
            )
        return node

    def _node(self, event: Any, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        before = self._count
        self._add(1, event)
        if depth > MAX_DEPTH:
            raise self._error(event, f"is nested more than {MAX_DEPTH} levels deep")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self._scalar(event), self._mark(event))
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, depth)
        else:
            node = self._mapping(event, depth)
        if node.height > MAX_DEPTH:
            raise self._error(
                event, f"is nested more than {MAX_DEPTH} levels deep once its aliases are followed"
            )
        if event.anchor is not None:
            self._anchors[event.anchor] = node, self._count - before
        return node

    def _add(self, values: int, event: Any) -> None:
        self._count += values
        if self._count > MAX_VALUES:
            raise self._error(event, f"holds more than {MAX_VALUES} values, aliases followed")

    def _alias(self, event: Any) -> Node:
        anchored = self._anchors.get(event.anchor)
        if anchored is None:
            known = "stands inside its own value" if event.anchor in self._anchors else "names no anchor"
            raise self._error(event, f"the alias *{event.anchor} {known}")
        node, values = anchored
        self._add(values, event)
        return replace(node, mark=self._mark(event)) if not isinstance(node.value, dict | list) else node

    def _sequence(self, event: Any, depth: int) -> Node:
        self._check_tag(event, "seq")
        items: list[Node] = []
        while not isinstance(entry := self._loader.get_event(), yaml.SequenceEndEvent):
            items.append(self._node(entry, depth + 1))
        return Node(items, self._mark(event), height=1 + max((n.height for n in items), default=0))

    def _mapping(self, event: Any, depth: int) -> Node:
        self._check_tag(event, "map")
        fields: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        while not isinstance(entry := self._loader.get_event(), yaml.MappingEndEvent):
            key = self._key(entry)
            value = replace(self._node(self._loader.get_event(), depth + 1), key=self._mark(entry))
            if key == "<<" and not entry.style:
                merged = self._merge(value, entry) | merged
                continue
            if key in fields:
                first = fields[key].key
                raise self._error(
                    entry,
                    f"the key {key!r} was already given",
                    f"first at line {first.line}" if first and first.line else None,
                )
            fields[key] = value
        fields = merged | fields
        height = 1 + max((node.height for node in fields.values()), default=0)
        return Node(fields, self._mark(event), height=height)

    def _key(self, event: Any) -> str:
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
            if isinstance(value, str):
                return value
        raise self._error(event, "a key must be text", "put it in quotes")

    def _merge(self, value: Node, event: Any) -> dict[str, Node]:
        """The fields that `<<: *base` or `<<: [*first, *second]` brings in; earlier ones win."""
        fields: dict[str, Node] = {}
        for node in value.value if isinstance(value.value, list) else [value]:
            if not isinstance(node.value, dict):
                raise self._error(event, "`<<` takes an alias of a mapping, or a list of them")
            fields = node.value | fields
        return fields

    def _scalar(self, event: Any) -> Scalar:
        if event.tag not in (None, "!", _TAG + "str"):
            raise self._error(event, f"the tag {_short(event.tag)} is not allowed in a job spec")
        unquoted = event.tag is None and event.implicit[0]
        return _plain_scalar(event.value) if unquoted else str(event.value)

    def _check_tag(self, event: Any, kind: str) -> None:
        if event.tag not in (None, "!", _TAG + kind):
            raise self._error(event, f"the tag {_short(event.tag)} is not allowed in a job spec")

    def _mark(self, event: Any) -> Mark:
        if not self._origin.line:
            return self._origin
        return Mark(self._origin.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _error(self, event: Any, what: str, hint: str | None = None) -> SpecError:
        return SpecError([self._mark(event).problem(what, hint)])


def _plain_scalar(text: str) -> Scalar:
    """What an unquoted scalar means."""
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
