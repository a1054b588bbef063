"""plan, submit and check of a spec that says auto."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpc_rlhf.cli import group
from tests.spec.texts import JOBS

AUTO = [
    *("--set", "slurm.gpu=a100-80g", "--set", "stages.sft.zero=auto", "--set", "stages.sft.micro_batch=auto"),
    *("--set", "stages.sft.global_batch=64", "--set", "stages.ppo.offload=auto"),
]


def cli(*args: object) -> Result:
    return CliRunner().invoke(group, [str(arg) for arg in args], catch_exceptions=False)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where its relative run_dir begins


def test_plan_shows_the_choice_and_its_alternatives() -> None:
    result = cli("plan", JOBS / "opt-13b.yaml", *AUTO)
    chosen = next(line for line in result.stdout.splitlines() if line.endswith("chosen"))
    assert chosen.startswith("sft ")
    assert "x 1.00" in chosen
    assert "combinations that fit, out of" in result.stderr


def test_json_has_every_combination() -> None:
    facts = json.loads(cli("plan", JOBS / "opt-13b.yaml", "--json", *AUTO).stdout)["auto"]
    assert set(facts) == {"sft", "ppo"}
    assert set(facts["sft"]["chosen"]) == {"zero", "micro_batch"}
    assert set(facts["ppo"]["chosen"]) == {"offload_optimizer", "offload_params", "offload_frozen"}
    assert len(facts["sft"]["considered"]) == 4 * 4
    assert {"fields", "seconds", "held", "fits"} == set(facts["sft"]["considered"][0])


def test_submit_and_check_choose_too() -> None:
    result = cli("submit", JOBS / "opt-13b.yaml", "--dry-run", *AUTO)
    assert result.exit_code == 0
    assert result.stderr.startswith("sft: zero: ")
    assert cli("check", JOBS / "opt-13b.yaml", *AUTO).stdout.endswith(": ok\n")
    wrong = cli("check", JOBS / "opt-13b.yaml", "--set", "stages.sft.zero=auto")
    assert wrong.exit_code == 2
    assert "auto needs the name of the GPU" in wrong.stdout
