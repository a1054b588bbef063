"""`hpc-rlhf schema` describes the specs that users write."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.spec.texts import JOBS


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "hpc_rlhf.cli", "schema"], capture_output=True, text=True)
    assert done.returncode == 0
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def parts(value: Any) -> list[dict[str, Any]]:
    below = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [*([value] if isinstance(value, dict) else []), *(part for item in below for part in parts(item))]


def test_every_field_is_described(schema: dict[str, Any]) -> None:
    models = [schema, *schema["$defs"].values()]
    bare = [name for model in models for name, field in model["properties"].items() if "description" not in field]
    assert bare == []


def test_references_and_names(schema: dict[str, Any]) -> None:
    assert schema["title"] == "hpc-rlhf job spec"
    assert schema["$schema"].startswith("https://json-schema.org/")
    for part in parts(schema):
        if "$ref" in part:
            assert part["$ref"].removeprefix("#/$defs/") in schema["$defs"]


def test_job_specs_use_only_its_fields(schema: dict[str, Any]) -> None:
    for path in JOBS.glob("*.yaml"):
        spec = yaml.safe_load(path.read_text())
        assert spec.keys() <= schema["properties"].keys()
        for stage, fields in spec["stages"].items():
            assert fields.keys() <= schema["$defs"][f"{stage.capitalize()}Spec"]["properties"].keys()


def test_spec_that_extends_another_may_be_incomplete(schema: dict[str, Any]) -> None:
    assert "extends" in schema["properties"]
    assert {"required": ["extends"]} in schema["anyOf"]
