"""The pages that a user reads, and the snippets in them.

A page is a script: its snippets are run from top to bottom in one folder, which has this project's jobs and hostfiles, and
itself as hpc-rlhf/. A comment on a line of its own above a snippet says what is special about it:

    <!-- needs a cluster -->         not run here; its commands are still parsed. Or another word of NEEDS.
    <!-- ends with 2 -->             its exit code
    <!-- file: my-job.yaml -->       put into that file of the folder; a spec with mistakes: <!-- file: it.yaml, with mistakes -->

YAML without a name of a run is a part of a spec, and is laid over jobs/opt-6.7b.yaml. Text below commands is what they print.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
# What a test of a page cannot have. Minutes: other tests take them.
NEEDS = ("a cluster", "a GPU", "a run", "a person", "minutes", "other machines", "the network")
COMMENT = re.compile(r"<!-- (.*) -->")
# Commands are also told by four spaces.
INDENTED = re.compile(r" {4}((?:hpc-rlhf|make|export|sinfo)\b.*)")


@dataclass
class Snippet:
    """A block of code.

    Attributes:
        line: of the page, on which it begins.
        language: sh, yaml, python, text or another; empty where the page does not say.
        said: what the comment above it says; empty where there is none.
    """

    page: Path
    line: int
    language: str
    text: str
    said: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs(self) -> str:
        """What running it takes that there is not here; empty where it is to be run."""
        return self.said.removeprefix("needs ") if self.said.startswith("needs ") else ""

    @property
    def file(self) -> str:
        return self.said.removeprefix("file: ").partition(",")[0] if self.said.startswith("file: ") else ""


def snippets(page: Path) -> list[Snippet]:
    """Those of a page, from top to bottom."""
    found: list[Snippet] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    said, indented = "", False
    for number, line in lines:
        match = INDENTED.fullmatch(line)
        if line.startswith("```"):
            text = "\n".join(_until_fence(lines))
            found.append(Snippet(page, number, line.removeprefix("```").strip(), text, said))
        elif match and indented:
            found[-1].text += f"\n{match[1]}"
            continue
        elif match:
            found.append(Snippet(page, number, "sh", match[1], said))
        elif comment := COMMENT.fullmatch(line):
            said, indented = comment[1], False
            continue
        indented = bool(match)
        if line:
            said = ""
    return found


def _until_fence(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for _, line in lines:
        if line.startswith("```"):
            return
        yield line
