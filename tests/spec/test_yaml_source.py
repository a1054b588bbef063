"""The YAML reader agrees with `yaml.safe_load` except for the documented differences."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec.yaml_source import Mark, Node, parse_yaml
from tests.spec.texts import GOOD, JOBS

HERE = Mark("x.yaml", 1, 1)


def plain(text: str) -> Any:
    return parse_yaml(text, HERE).plain()


def as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("1e-4", "1.0e-4"),
        "a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\ne: {c: 4, <<: [*x, {f: 5}]}",
        "a: |\n  two\n  lines\nb: >-\n  one\n  line",
        "{a: yes, b: Off, c: ~, d: Null, e: , f: 'yes', g: \"\\u00e9\", h: -3, i: .5, j: -.inf, k: +1.5e+3}",
        "a: &n 5\nb: [*n, *n]\nc: !!str 12",
    ],
)
def test_same_as_safe_load(text: str) -> None:
    assert plain(text) == as_tuples(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5e3),
        ("1.e-3", 1e-3),
        ("12:00:00", "12:00:00"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("0123", "0123"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
    ],
)
def test_documented_differences_from_safe_load(text: str, value: object) -> None:
    assert plain(text) == value


def test_nan_is_not_a_number() -> None:
    assert not isinstance(plain(".nan"), float) or math.isnan(plain(".nan"))


def test_every_node_knows_its_place() -> None:
    def check(node: Node, lines: list[str]) -> None:
        rest = lines[node.mark.line - 1][node.mark.column - 1 :]
        if isinstance(node.value, dict):
            for key, below in node.value.items():
                assert below.key is not None
                assert lines[below.key.line - 1][below.key.column - 1 :].startswith(key)
                check(below, lines)
        elif isinstance(node.value, list):
            for below in node.value:
                check(below, lines)
        elif isinstance(node.value, str):
            assert rest.lstrip("'\"").startswith(node.value)
        else:
            assert plain(re.split(r"[,}\]]*(\s|$)", rest)[0]) == node.value

    for path in JOBS.glob("*.yaml"):
        text = path.read_text()
        check(parse_yaml(text, HERE), text.splitlines())


def test_values_of_an_option_have_its_place() -> None:
    mark = Mark("--set a.b")
    node = parse_yaml("{c: [1]}", mark)
    below = node.get("c")
    assert below is not None
    assert below.mark == below.key == mark


@given(st.text(alphabet=st.sampled_from("ab:-#&*!|>'\"%@`{}[],? \n\t\\~=<.0123e+_\x00\x85\ufeff\ud800"), max_size=60))
def test_any_text_parses_or_raises_spec_error(text: str) -> None:
    with contextlib.suppress(SpecError):
        parse_yaml(text, HERE)
