"""Writes the pages that the code itself is the source of: every field of a spec, and every command. `make docs` runs it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hpc_rlhf.cli import VERBS, group
from hpc_rlhf.spec import job, schema
from hpc_rlhf.spec.fields import Model

HERE = Path(__file__).parent
Schema = dict[str, Any]

MADE = "<!-- Made by `make docs`: change the code that it tells of, not this file. -->\n"

FIELDS = """\
# Every field of a spec

A spec is YAML, read as `yaml.safe_load` reads it, with these differences: a key that stands twice is an error, as is a
field that is not listed here; `1e-4` is a number; dates and times such as `12:00:00` are text.

- `${VAR}` and `${VAR:-default}` are filled in where a field is a path, and nowhere else. A relative path starts where
  the command is run.
- `extends: base.yaml` lays a file over another: mappings are merged, everything else is replaced.
- `--set stages.ppo.actor_lr=1e-6` lays one field over that. Values are YAML.
- What a stage has under `slurm` is laid over the `slurm` of the whole spec.

`hpc-rlhf check` lists everything wrong in a spec, `hpc-rlhf schema` prints all this for editors.
"""

COMMANDS = """\
# Every command

`RUN` is a run directory, or the job file that names it. Data goes to stdout, words to stderr. Colour and progress bars
are for terminals only, and `NO_COLOR` turns colour off. Exit codes: 0 good, 1 the run failed, 2 what you gave was wrong;
as shells have it, 130 after Ctrl-C.

With `HPC_RLHF_DEBUG=1`, an error that is a bug shows its traceback.
"""


def pages() -> dict[str, str]:
    """The text of each page, by its file name."""
    return {"spec.md": spec_page() + "\n", "commands.md": commands_page() + "\n"}


def commands_page() -> str:
    """The help of every verb."""
    index = "\n".join(f"- [{verb}](#hpc-rlhf-{verb}): {words}" for verb, words in VERBS.items())
    return "\n".join([MADE, COMMANDS, index, *map(_command, VERBS)])


def _command(verb: str) -> str:
    parent = click.Context(group, info_name="hpc-rlhf", **group.context_settings)
    command = group.get_command(parent, verb)
    assert command is not None
    context = click.Context(command, parent, verb, terminal_width=100, max_content_width=100)
    return f"\n## hpc-rlhf {verb}\n\n```text\n{command.get_help(context).rstrip()}\n```"


def spec_page() -> str:
    """A table of fields for every part of a spec."""
    whole = schema.json_schema()
    parts = {"": whole, **whole["$defs"]}
    classes = dict(_classes(Model))
    titles = _titles(parts, classes)
    sections = [_section(name, title, parts, classes, titles) for name, title in titles.items()]
    index = "\n".join(f"- [{title}](#{_anchor(title)})" for title in titles.values())
    return "\n".join([MADE, FIELDS, index, *sections])


def _classes(base: type[Model]) -> Iterator[tuple[str, type[Model]]]:
    for cls in base.__subclasses__():
        yield cls.__name__, cls
        yield from _classes(cls)


def _titles(parts: dict[str, Schema], classes: dict[str, type[Model]]) -> dict[str, str]:
    """The parts in the order in which a reader comes to them, each by where it first stands in a spec.

    What several stages have in common comes before the first of them.
    """
    found: dict[str, str] = {}

    def visit(name: str, path: str) -> None:
        if name in found:
            return
        for common in _common(classes.get(name)):
            found.setdefault(common.__name__, (inspect.getdoc(common) or "").partition("\n")[0].rstrip("."))
        found[name] = f"`{path}`" if path else "The whole spec"
        for field, facts in parts[name]["properties"].items():
            for below, step in _refs(facts):
                visit(below, ".".join(filter(None, (path, field))) + step)

    visit("", "")
    return found


def _common(cls: type[Model] | None) -> list[type[Model]]:
    """What a part shares with others, the most general first."""
    bases = cls.__mro__[1:] if cls else ()
    return [base for base in reversed(bases) if issubclass(base, Model) and base is not Model]


def _refs(facts: Schema) -> Iterator[tuple[str, str]]:
    """The parts that a field may hold, and the step of the path that leads into it."""
    if "$ref" in facts:
        yield facts["$ref"].rpartition("/")[2], ""
    for kind in facts.get("anyOf", ()):
        yield from _refs(kind)
    if "items" in facts:
        yield from ((name, f"[]{step}") for name, step in _refs(facts["items"]))


def _section(
    name: str, title: str, parts: dict[str, Schema], classes: dict[str, type[Model]], titles: dict[str, str]
) -> str:
    cls = classes.get(name, job.JobSpec)
    # What several parts have in common is no part of the schema by itself.
    facts = parts[name] if name in parts else cls.model_json_schema()
    said, common, fields = inspect.getdoc(cls), _common(cls), facts["properties"]
    if common:
        fields = {field: facts for field, facts in fields.items() if field in cls.__annotations__}
    shared = "".join(
        f"; with [{titles[base.__name__].lower()}](#{_anchor(titles[base.__name__])})" for base in common
    )
    required = facts["anyOf"][0]["required"] if not name else facts.get("required", ())
    rows = [_row(field, facts, field in required, titles) for field, facts in fields.items()]
    lines = ["", f"## {title}", "", said or "", *(["", f"Its own fields{shared}:"] if shared else [])]
    return "\n".join([*lines, "", "| field | type | default | |", "|---|---|---|---|", *rows])


def _row(field: str, facts: Schema, required: bool, titles: dict[str, str]) -> str:
    cells = (f"`{field}`", _type(facts, titles), _default(facts, required), facts.get("description", ""))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _type(facts: Schema, titles: dict[str, str]) -> str:
    if "$ref" in facts:
        title = titles[facts["$ref"].rpartition("/")[2]]
        return f"[{title}](#{_anchor(title)})"
    if "anyOf" in facts:
        kinds = [_type(kind, titles) for kind in facts["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in facts or "const" in facts:
        return " or ".join(f"`{value}`" for value in facts.get("enum", [facts.get("const")]))
    return _plain_type(facts, titles)


def _plain_type(facts: Schema, titles: dict[str, str]) -> str:
    kind = facts.get("type")
    if kind == "array":
        if "prefixItems" in facts:
            return f"list of {len(facts['prefixItems'])}: {_type(facts['prefixItems'][0], titles)}"
        return f"list of {_type(facts.get('items', {}), titles)}"
    if kind == "object":
        return f"mapping to {_type(facts.get('additionalProperties') or {}, titles)}"
    if kind in ("integer", "number"):
        return " ".join(filter(None, ({"integer": "whole number", "number": "number"}[kind], _bounds(facts))))
    return {"string": "text", "boolean": "`true` or `false`"}.get(str(kind), "anything")


def _bounds(facts: Schema) -> str:
    said = []
    for key, words in (("minimum", "from {}"), ("exclusiveMinimum", "above {}")):
        if key in facts:
            said.append(words.format(f"{facts[key]:,}"))
    # Bounds that only keep a number within 32 or 64 bits are of no interest.
    for key, words in (("maximum", "to {}"), ("exclusiveMaximum", "below {}")):
        if facts.get(key, 2**31) < 2**31:
            said.append(words.format(f"{facts[key]:,}"))
    return " ".join(said)


def _default(facts: Schema, required: bool) -> str:
    if required:
        return "**needed**"
    value = facts.get("default")
    if value is None or value == [] or isinstance(value, dict):
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
