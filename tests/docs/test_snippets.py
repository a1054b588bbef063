"""The commands, specs and programs in README, docs/ and examples/ work as written."""

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
    return value.place if isinstance(value, Snippet) else str(Path(str(value)).relative_to(ROOT))


def commands(snippet: Snippet) -> Iterator[list[str]]:
    """The snippet's hpc-rlhf and make commands."""
    for line in snippet.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] in ("hpc-rlhf", "make"):
            yield list(takewhile(lambda word: word not in ("|", ">"), words))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a page's snippets run: beside the project's jobs, hostfiles and examples, with hpc-rlhf on PATH."""
    for name in ("jobs", "hostfiles", "examples"):
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
def test_page_runs_from_top_to_bottom(page: Path, folder: Path) -> None:
    output = ""
    for snippet in snippets(page):
        if snippet.file:
            (folder / snippet.file).parent.mkdir(exist_ok=True, parents=True)
            (folder / snippet.file).write_text(snippet.text + "\n")
        if snippet.language == "text" and output and not snippet.needs:
            assert snippet.text.rstrip() in output, f"{snippet.place}: the output was\n{output}"
        output = ""
        if snippet.language == "sh" and not snippet.needs:
            result = run(folder, "bash", "-euo", "pipefail", "-c", snippet.text)
            assert result.returncode == (2 if snippet.marker == "ends with 2" else 0), (
                f"{snippet.place}: {result.stdout}\n"
                f"if it cannot run here, put a comment above it, such as <!-- needs {NEEDS[0]} -->"
            )
            output = result.stdout or "\n"
        elif snippet.language == "yaml" and not snippet.needs:
            check_spec(snippet, folder)


def check_spec(snippet: Snippet, folder: Path) -> None:
    """Check a spec snippet, unless it is marked as wrong: then the command below it reports the errors."""
    if snippet.marker.endswith("with mistakes"):
        return
    is_whole = re.search("^name:", snippet.text, flags=re.MULTILINE)
    text = snippet.text if is_whole else f"extends: {BASE}\n{snippet.text}"
    (folder / ".snippet.yaml").write_text(text)
    result = run(folder, "hpc-rlhf", "check", ".snippet.yaml")
    assert result.returncode == 0, f"{snippet.place}: {result.stdout}"


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.language == "sh"], ids=id_of)
def test_commands_exist(snippet: Snippet) -> None:
    assert not snippet.needs or snippet.needs in NEEDS, f"{snippet.place}: use one of {NEEDS}"
    for words in commands(snippet):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= TARGETS, snippet.place
            continue
        check_command(words[1:], snippet.place)
        for word in words:
            if word.startswith(("jobs/", "hostfiles/", "examples/")):
                assert (ROOT / word).is_file(), snippet.place


def check_command(words: list[str], place: str) -> None:
    """Fail unless the words after `hpc-rlhf` are a command with options that it has."""
    try:
        verb, *rest = words
        if not verb.startswith("-"):
            # A command keeps the help option that its first context gives it.
            parent = click.Context(group, **group.context_settings)
            command = group.get_command(parent, verb)
            assert command is not None
            command.make_context(verb, rest, parent=parent).close()
    except click.exceptions.Exit:
        pass  # --help
    except click.ClickException as error:
        pytest.fail(f"{place}: hpc-rlhf {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.language == "python"], ids=id_of)
def test_python_snippets_run(snippet: Snippet) -> None:
    """The programs of docs/api.md are examples, which tests/test_api.py runs."""
    ast.parse(snippet.text)
    if not snippet.needs:
        assert snippet.page.name == "api.md", f"{snippet.place}: no test runs it"
        programs = [(ROOT / "examples" / f"{name}_loop.py").read_text() for name in ("ppo", "grpo")]
        assert snippet.text + "\n" in programs
    else:
        assert snippet.needs in NEEDS, snippet.place


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\bsrc(?:set)?="([^"]+)"', text):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_named_files_exist(page: Path) -> None:
    """Code in backticks is a path from the project's root, or the end of a path in hpc_rlhf/ or templates/."""
    names = re.findall(r"`([\w./-]+\.(?:py|j2|sh))`", page.read_text(encoding="utf-8"))
    for name in names:
        matches = [path for base in ("hpc_rlhf", "templates") for path in (ROOT / base).glob(f"**/{name}")]
        assert matches or (ROOT / name).exists(), f"{page.name}: {name}"
