"""What docs/ has of the code itself is as the code is now: fields, commands, files, events."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest

from hpc_rlhf.cli import VERBS, group
from hpc_rlhf.run.layout import RunDir, StageDir
from hpc_rlhf.spec.schema import json_schema
from tests.docs.pages import ROOT
from tests.docs.test_snippets import parses

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
            f"docs/{name} is behind the code: run `make docs` (.venv/bin/python docs/generate.py) and commit it"
        )


def test_every_field_is_documented() -> None:
    schema, page = json_schema(), (DOCS / "spec.md").read_text(encoding="utf-8")
    for part in (schema, *schema["$defs"].values()):
        for field, facts in part["properties"].items():
            assert f"| `{field}` |" in page
            assert facts.get("description"), (
                f"{part['title']}.{field} has no description: say why one chooses it"
            )


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_in_an_example_that_works(verb: str) -> None:
    ours = click.Context(group, info_name="hpc-rlhf", **group.context_settings)
    command = group.get_command(ours, verb)
    assert command is not None
    text = command.get_help(click.Context(command, ours, verb, terminal_width=100))
    after_options = text.rpartition("Show this message and exit.")[2]
    examples = re.findall(r"^ *hpc-rlhf (.*)$", after_options, flags=re.MULTILINE)
    assert examples, (
        f"hpc-rlhf {verb} --help ends without an example; give the command an `epilog=example(…)`"
    )
    for words in examples:
        parses(shlex.split(words.partition(" > ")[0], comments=True), f"hpc-rlhf {verb} --help")


def names_of(cls: type, path: Path) -> set[str]:
    """The files that a class of rundir.py names."""
    thing = cls(path)
    named = (getattr(thing, name) for name, kind in vars(cls).items() if isinstance(kind, property))
    return {each.name for each in named if isinstance(each, Path)}


def test_every_file_of_a_run_is_documented() -> None:
    page = (DOCS / "run-directory.md").read_text(encoding="utf-8")
    for name in names_of(RunDir, Path("/run")) | names_of(StageDir, Path("/run/stages/sft")):
        assert f"{name}" in page, f"docs/run-directory.md says nothing of {name}"


def test_every_event_of_the_ledger_is_documented() -> None:
    page = (DOCS / "run-directory.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hpc_rlhf").rglob("*.py"))
    noted = re.findall(r"""(?:[Ll]edger(?:\([\w.]+\))?\.append|\.note|\._note)\(\s*"(\w+)\"""", code)
    assert len(set(noted)) > 15
    for event in sorted(set(noted)):
        assert f"| `{event}` |" in page, f"docs/run-directory.md says nothing of the event {event}"


def test_messages_are_quoted_as_the_code_says_them() -> None:
    """Each one in the troubleshooting has a part of it, with what is filled in between, or is a part of it."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "hpc_rlhf").rglob("*.py")]
    said = {
        node.value.strip()
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [text for text in re.findall(r"`([^`\n]+)`", page) if len(text.split()) > 3]
    assert len(quoted) > 25
    for text in quoted:
        plain = text.rstrip(" …:")
        assert any((len(part) > 11 and part in text) or plain in part for part in said), text
