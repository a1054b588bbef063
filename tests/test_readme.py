"""The README is true: its commands are there, its first ones work, its spec is sound."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from hpc_rlhf.cli import group

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for line in re.findall(r"^    ((?:hpc-rlhf|make) .*)$", README, flags=re.MULTILINE)
]
RUN_FOR_REAL = ("init", "check", "plan", "render")


def hpc_rlhf(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpc_rlhf.cli", *words],
        cwd=folder,
        env={**os.environ, "SCRATCH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_one(words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
        return
    command = group.get_command(click.Context(group), words[1])
    assert command is not None
    command.make_context(words[1], words[2:]).close()
    for word in words[2:]:
        if word.startswith(("jobs/", "hostfiles/")):
            assert (ROOT / word).is_file()


def test_the_commands_that_need_no_cluster_work_in_their_order(tmp_path: Path) -> None:
    wanted = [words[1:] for words in COMMANDS if words[1] in RUN_FOR_REAL]
    assert [words[0] for words in wanted] == list(RUN_FOR_REAL)
    for words in wanted:
        done = hpc_rlhf(tmp_path, *words)
        assert done.returncode == 0, done.stderr


def test_the_spec_is_sound(tmp_path: Path) -> None:
    (spec,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "job.yaml").write_text(spec)
    done = hpc_rlhf(tmp_path, "check", "job.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
