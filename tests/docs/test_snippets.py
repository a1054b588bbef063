"""The commands, specs and programs of the README and docs/ work as they stand there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import click
import pytest

from hpc_rlhf.cli import group
from tests.docs.pages import NEEDS, PAGES, ROOT, Snippet, snippets

SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]
BASE = ROOT / "jobs" / "opt-6.7b.yaml"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def id_of(value: object) -> str:
    return value.place if isinstance(value, Snippet) else Path(str(value)).name


def commands(snippet: Snippet) -> Iterator[list[str]]:
    """Those of ours, and make's."""
    for line in snippet.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] in ("hpc-rlhf", "make"):
            yield list(takewhile(lambda word: word not in ("|", ">"), words))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a page's snippets run: with the jobs and hostfiles of this project, a clone of it, and its command on PATH."""
    for name in ("jobs", "hostfiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "hpc-rlhf").symlink_to(ROOT)
    program = tmp_path / ".bin" / "hpc-rlhf"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hpc_rlhf.cli "$@"\n')
    program.chmod(0o755)
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / '.bin'}:{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "SCRATCH": str(folder), "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_a_page_works_from_top_to_bottom(page: Path, folder: Path) -> None:
    printed = ""
    for snippet in snippets(page):
        if snippet.file:
            (folder / snippet.file).parent.mkdir(exist_ok=True, parents=True)
            (folder / snippet.file).write_text(snippet.text + "\n")
        if snippet.language == "text" and printed and not snippet.needs:
            assert snippet.text.rstrip() in printed, f"{snippet.place}: it printed\n{printed}"
        printed = ""
        if snippet.language == "sh" and not snippet.needs:
            done = run(folder, "bash", "-euo", "pipefail", "-c", snippet.text)
            assert done.returncode == (2 if snippet.said == "ends with 2" else 0), (
                f"{snippet.place}: {done.stdout}\n"
                f"where it cannot work here, put a comment above it, such as <!-- needs {NEEDS[0]} -->"
            )
            printed = done.stdout or "\n"
        elif snippet.language == "yaml" and not snippet.needs:
            check_spec(snippet, folder)


def check_spec(snippet: Snippet, folder: Path) -> None:
    """A snippet that shows a mistake says so; the command below it tells of it."""
    if snippet.said.endswith("with mistakes"):
        return
    whole = re.search("^name:", snippet.text, flags=re.MULTILINE)
    text = snippet.text if whole else f"extends: {BASE}\n{snippet.text}"
    (folder / ".snippet.yaml").write_text(text)
    done = run(folder, "hpc-rlhf", "check", ".snippet.yaml")
    assert done.returncode == 0, f"{snippet.place}: {done.stdout}"


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.language == "sh"], ids=id_of)
def test_every_command_is_one(snippet: Snippet) -> None:
    assert not snippet.needs or snippet.needs in NEEDS, f"{snippet.place}: say one of {NEEDS}"
    for words in commands(snippet):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= TARGETS, snippet.place
            continue
        parses(words[1:], snippet.place)
        for word in words:
            if word.startswith(("jobs/", "hostfiles/")):
                assert (ROOT / word).is_file(), snippet.place


def parses(words: list[str], place: str) -> None:
    """Whether the words after `hpc-rlhf` are a verb with options that it has."""
    try:
        verb, *rest = words
        if not verb.startswith("-"):
            # A command keeps the option for help that its first context gives it.
            ours = click.Context(group, **group.context_settings)
            command = group.get_command(ours, verb)
            assert command is not None
            command.make_context(verb, rest, parent=ours).close()
    except click.exceptions.Exit:
        pass  # --help
    except click.ClickException as error:
        pytest.fail(f"{place}: hpc-rlhf {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.language == "python"], ids=id_of)
def test_every_program_is_run(snippet: Snippet) -> None:
    """The one of docs/api.md is, by tests/test_api.py."""
    (program,) = [s.text for s in SNIPPETS if s.language == "python" and s.page.name == "api.md"]
    ast.parse(snippet.text)
    assert snippet.text == program or snippet.needs in NEEDS, snippet.place


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\bsrc(?:set)?="([^"]+)"', text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        to = page.parent / file if file else page
        assert to.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(to), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """As GitHub gives them to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
