"""Randomly mutated specs: each one loads or raises a printable SpecError."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rlhf.errors import SpecError
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec, load_spec, read_spec
from tests.spec.texts import GOOD, JOBS, write

ORIGINALS = [GOOD, *(path.read_text() for path in sorted(JOBS.glob("*.yaml")))]
PIECES = ["\t", "\n", "\0", "\x1b", "\ud7ff", "\u2028", "\ufeff", ": ", "- ", "&a ", "*a", "!!x ", "{", "}", "[", "]", "|", ">", "'", '"', "#", "%", "@", "`", "---\n", "...\n", "<<: ", "${A}", "$(x)", "; rm", "é", "😀", "?", "~"]  # fmt: skip  # noqa: E501
VALUES: list[Any] = [None, True, "auto", -1, 0, 1, 10**30, -0.5, 1e308, float("inf"), float("nan"), "", " ", "no", "x" * 5000, "a\nb", "$(touch x)", "; rm -rf /", "`id`", "${PATH}", "${NO_SUCH}", "../..", "/dev/null", "\ud7ff", "é", [], [[]], {}, {"a": {}}, [None], {"": 1}, {"from_scratch": {}}, "12:00:00", "2024-01-01", b"\xff"]  # fmt: skip  # noqa: E501


def mutate_text(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        lines = text.splitlines(keepends=True) or [""]
        line = rng.randrange(len(lines))
        at = rng.randint(0, len(text))
        end = at + rng.randint(0, 30)
        action = rng.randrange(7)
        if action == 0:
            text = text[:at] + text[end:]
        elif action == 1:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif action == 2:
            text = text[:at] + rng.choice(PIECES) + text[end:]
        elif action == 3:
            del lines[line]
        elif action == 4:
            lines.insert(line, lines[line])
        elif action == 5:
            lines[line] = " " * rng.randint(1, 3) + lines[line]
        else:
            lines[line] = lines[line].lstrip(" ")
        text = "".join(lines) if action > 2 else text
    return text


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a tree, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate_tree(text: str, rng: random.Random) -> str:
    tree = yaml.safe_load(text)
    for _ in range(rng.randint(1, 3)):
        found = places(tree)
        if not found:
            break
        (inside, key), (other, other_key) = rng.choice(found), rng.choice(found)
        action = rng.randrange(4)
        if action == 0:
            inside[key] = rng.choice(VALUES)
        elif action == 1:
            inside[key] = copy.deepcopy(other[other_key])
        elif action == 2:
            del inside[key]
        elif isinstance(inside, list):
            inside.append(inside[key])
        else:
            names = [str(key)[:-1], f"{key}s", str(key).upper(), "x", 12, None, "slurm", "a.b"]
            inside[rng.choice(names)] = inside[key]
    return yaml.safe_dump(tree, allow_unicode=True)


def outcome(path: Path) -> JobSpec | SpecError:
    try:
        return load_spec(path)
    except SpecError as error:
        return error


def variants(mutate: Callable[[str, random.Random], str], seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [mutate(rng.choice(ORIGINALS), rng) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [mutate_text, mutate_tree])
def test_mutated_specs_load_or_raise_spec_error(tmp_path: Path, mutate: Callable[[str, random.Random], str]) -> None:
    loaded, count = 0, 5000 if os.environ.get("HPC_RLHF_FUZZ") else 1000
    for text in variants(mutate, seed=7, count=count):
        path = write(tmp_path, text)
        result = outcome(path)
        if isinstance(result, SpecError):
            assert result.problems
            assert all(line.isprintable() for line in str(result).splitlines()), text
            assert len(str(result).splitlines()) == len(result.problems), text
            continue
        loaded += 1
        # A spec that loads can be planned, and round-trips, but for its `auto`: a run's spec has values instead.
        make_plan(result)
        assert read_spec(write(tmp_path, dump_spec(result), "dump.yaml")) == result.with_autos({}), text
    assert count / 50 < loaded < 0.8 * count  # both kinds were met


def test_check_handles_many_mutated_specs(tmp_path: Path) -> None:
    texts = variants(mutate_text, 1, 100) + variants(mutate_tree, 2, 100)
    files = [str(write(tmp_path, text, f"{i}.yaml")) for i, text in enumerate(texts)]
    done = subprocess.run([sys.executable, "-m", "hpc_rlhf.cli", "check", *files], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {line.split(".yaml:")[0] for line in done.stdout.splitlines()} == {file[:-5] for file in files}
