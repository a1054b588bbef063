"""docs/ covers what is in the code: fields, commands, files, events and messages."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import click
import pytest

from hpc_rlhf.cli import VERBS, group
from hpc_rlhf.run.events import KINDS
from hpc_rlhf.run.layout import Inside, RunDir, StageDir
from hpc_rlhf.spec.job import json_schema
from tests.docs.pages import ROOT
from tests.docs.test_snippets import check_command

DOCS = ROOT / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    for name, text in generator().pages().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, (
            f"docs/{name} is out of date: run `make docs` (.venv/bin/python docs/generate.py) and commit the result"
        )


def test_every_field_is_documented() -> None:
    schema, page = json_schema(), (DOCS / "spec.md").read_text(encoding="utf-8")
    for part in (schema, *schema["$defs"].values()):
        for field, facts in part["properties"].items():
            assert f"| `{field}` |" in page
            assert facts.get("description"), f"{part['title']}.{field} has no description: say when to use it"


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_a_valid_example(verb: str) -> None:
    parent = click.Context(group, info_name="hpc-rlhf", **group.context_settings)
    command = group.get_command(parent, verb)
    assert command is not None
    text = command.get_help(click.Context(command, parent, verb, terminal_width=100))
    after_options = text.rpartition("Show this message and exit.")[2]
    examples = re.findall(r"^ *hpc-rlhf (.*)$", after_options, flags=re.MULTILINE)
    assert examples, f"hpc-rlhf {verb} --help does not end with an example; give the command an `epilog=example(…)`"
    for words in examples:
        check_command(shlex.split(words.partition(" > ")[0], comments=True), f"hpc-rlhf {verb} --help")


def file_names(layout: type) -> set[str]:
    return {Path(each.name).name for each in vars(layout).values() if isinstance(each, Inside)}


def test_every_file_of_a_run_is_documented() -> None:
    page = (DOCS / "run-directory.md").read_text(encoding="utf-8")
    names = file_names(RunDir) | file_names(StageDir)
    assert len(names) > 15
    for name in names:
        assert name in page, f"docs/run-directory.md does not mention {name}"


def test_every_ledger_event_is_documented() -> None:
    page = (DOCS / "run-directory.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        own = [each.name for each in fields(kind) if each.name not in ("stage", "time")]
        row = f"| `{name}` | {', '.join(own) or '–'} | {kind.__doc__} |"
        assert row in page, f"docs/run-directory.md lacks this row of the events: {row}"


def test_quoted_messages_exist_in_the_code() -> None:
    """Each message that troubleshooting.md quotes contains a string of the code (values are filled in), or is
    part of one."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "hpc_rlhf").rglob("*.py")]
    strings = {
        node.value.strip()
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = [text for text in re.findall(r"`([^`\n]+)`", page) if len(text.split()) > 3]
    assert len(quotes) > 25
    for text in quotes:
        plain = text.rstrip(" …:")
        assert any((len(string) > 11 and string in text) or plain in string for string in strings), text
