"""A spec written into a run directory reads back the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec, load_spec, read_spec
from tests.spec.texts import JOBS, write


def read_back(spec: JobSpec) -> JobSpec:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(dump_spec(spec))
        file.flush()
        return read_spec(Path(file.name))


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_job_specs_round_trip(path: Path) -> None:
    spec = load_spec(path)
    assert read_back(spec) == spec
    # Other tools can read it, and it has no aliases.
    assert "&id" not in dump_spec(spec)
    assert yaml.safe_load(dump_spec(spec))["name"] == spec.name


# Text that some YAML readers take for other types.
ODD = st.sampled_from(["no", "1e-4", "1E5", "0123", "12:00:00", "~", "null", "2024-01-01", "=", "<<", ".5", "1_0", "- a", "a: b", "# x", "'", '"', "é😀", "${A}", "*a", "!x", "%a", " a ", "\\n"])  # fmt: skip  # noqa: E501
TEXT = ODD | st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=30)
NUMBER = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@given(
    texts=st.lists(TEXT, min_size=6, max_size=6),
    numbers=st.lists(NUMBER, min_size=3, max_size=3),
    config=st.dictionaries(TEXT, st.integers(-(10**20), 10**20) | NUMBER | st.booleans() | TEXT, max_size=4),
    setup=st.lists(TEXT, max_size=3),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_valid_spec_round_trips(
    texts: list[str], numbers: list[float], config: dict[str, Any], setup: list[str], seed: int
) -> None:
    spec = JobSpec.model_validate(
        {
            "name": "1e5",
            "run_dir": texts[0],
            "seed": seed,
            "slurm": {"comment": texts[1], "setup": setup, "account": "0123", "extra": {"switches": 1, "x11": True}},
            "data": {"sources": [{"path": texts[2], "format": "hh", "weight": numbers[0], "subset": texts[3]}]},
            "models": {"actor": texts[4], "reward": {"from_scratch": {**config, "model_type": texts[5], "vocab_size": 300}}},  # noqa: E501
            "stages": {"sft": {"lr": numbers[1], "slurm": {"account": None}}, "reward": {"lr": numbers[2]}},
        }
    )  # fmt: skip
    assert read_back(spec) == spec


def test_runs_of_versions_without_adapted_experts_go_on_without_them(tmp_path: Path) -> None:
    sets = ("stages.sft.lora.rank=4", "stages.ppo.lora.rank=4", "stages.ppo.critic.lora.rank=2")
    spec = load_spec(JOBS / "tiny.yaml", sets)
    lines = dump_spec(spec).splitlines(keepends=True)
    old = read_spec(write(tmp_path, "".join(line for line in lines if "experts:" not in line)))
    for ours, theirs in ((spec.stages.sft, old.stages.sft), (spec.stages.ppo, old.stages.ppo)):
        assert ours.lora.experts
        assert theirs.lora == ours.lora.model_copy(update={"experts": False})
    assert old.stages.ppo.critic.lora.experts is False


def test_invalid_edit_of_job_yaml_is_reported_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, dump_spec(load_spec(JOBS / "tiny.yaml")).replace("seed: 1234", "seed: x"))
    with pytest.raises(SpecError, match=r"job.yaml:5:7: seed: must be a whole number"):
        read_spec(path)
