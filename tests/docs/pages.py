"""The documentation pages, and the code snippets in them.

A page works like a script: its snippets run from top to bottom in one folder, which has this project's jobs, hostfiles
and examples, and the project itself as hpc-rlhf/. A comment on its own line above a snippet marks it:

    <!-- needs a cluster -->         not run here, but its commands are parsed; one of NEEDS
    <!-- ends with 2 -->             the expected exit code
    <!-- file: my-job.yaml -->       written to that file; for a spec with errors: <!-- file: it.yaml, with mistakes -->

A YAML snippet without a run name is merged over jobs/opt-6.7b.yaml. A text snippet after commands is their output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
# What a page's test does not have. Snippets that take minutes are covered by other tests.
NEEDS = ("a cluster", "a GPU", "a run", "a user", "minutes", "other machines", "the network")
COMMENT = re.compile(r"<!-- (.*) -->")
# Commands can also be indented by four spaces instead of fenced.
INDENTED = re.compile(r" {4}((?:hpc-rlhf|make|export|sinfo)\b.*)")


@dataclass
class Snippet:
    """A block of code.

    Attributes:
        line: number of its first line on the page.
        language: sh, yaml, python, text or another; empty if the page gives none.
        marker: the comment above it; empty if there is none.
    """

    page: Path
    line: int
    language: str
    text: str
    marker: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs(self) -> str:
        """What running it takes that is missing here; empty if it can run."""
        return self.marker.removeprefix("needs ") if self.marker.startswith("needs ") else ""

    @property
    def file(self) -> str:
        """The file that it is written to; empty if none."""
        prefix = "file: "
        return self.marker.removeprefix(prefix).partition(",")[0] if self.marker.startswith(prefix) else ""


def snippets(page: Path) -> list[Snippet]:
    """The snippets of a page, from top to bottom."""
    result: list[Snippet] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    marker, in_indented = "", False
    for number, line in lines:
        command = INDENTED.fullmatch(line)
        if line.startswith("```"):
            text = "\n".join(_until_fence(lines))
            result.append(Snippet(page, number, line.removeprefix("```").strip(), text, marker))
        elif command and in_indented:
            result[-1].text += f"\n{command[1]}"
            continue
        elif command:
            result.append(Snippet(page, number, "sh", command[1], marker))
        elif comment := COMMENT.fullmatch(line):
            marker, in_indented = comment[1], False
            continue
        in_indented = bool(command)
        if line:
            marker = ""
    return result


def _until_fence(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for _, line in lines:
        if line.startswith("```"):
            return
        yield line
