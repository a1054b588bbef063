"""check, plan, render and doctor of a sweep as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpc_rlhf.cli import group
from hpc_rlhf.spec.hub import items
from hpc_rlhf.spec.sweep import load_any, specs_of
from tests.spec.texts import GOOD, write

SWEEP = GOOD + "sweep: {stages.ppo.kl_coef: [0.02, 0.1], seed: [1, 2, 3]}\nsweep_limit: 2\n"


def cli(*args: object) -> Result:
    return CliRunner().invoke(group, [str(arg) for arg in args], catch_exceptions=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path, SWEEP)


def test_check_counts_how_often_each_stage_is_trained(file: Path) -> None:
    result = cli("check", file)
    assert result.exit_code == 0
    assert result.stdout == (f"{file}: ok, a sweep of 6 runs: sft 3 times, reward 3 times, ppo 6 times\n")


def test_check_finds_the_error_of_one_run(file: Path) -> None:
    result = cli("check", file, "--set", "sweep.seed=[1, -2]")
    assert result.exit_code == 2
    assert result.stdout.splitlines() == ["--set sweep.seed: seed: must be at least 0, not -2"]


def test_plan_shows_which_run_trains_shared_stages(file: Path) -> None:
    rows = [line.split("  ") for line in cli("plan", file).stdout.splitlines()[1:7]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows[0] == ["kl_coef=0.02+seed=1", "sft, reward, ppo", "-"]
    assert rows[5] == ["kl_coef=0.1+seed=3", "ppo", "sft, reward from kl_coef=0.02+seed=3"]
    plan = json.loads(cli("plan", file, "--json").stdout)
    assert (plan["limit"], len(plan["runs"])) == (2, 6)
    last = plan["runs"][5]
    assert last["values"] == {"stages.ppo.kl_coef": 0.1, "seed": 3}
    assert last["shared"] == dict.fromkeys(("sft", "reward"), "kl_coef=0.02+seed=3")
    assert last["run_dir"] == f"{plan['run_dir']}/kl_coef=0.1+seed=3"


def test_each_run_is_rendered_into_its_own_folder(file: Path, tmp_path: Path) -> None:
    assert cli("render", file, "--out", tmp_path / "out").exit_code == 0
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 6
    scripts = {(folder / "ppo.sbatch").read_text() for folder in folders}
    assert len(scripts) == 6, "each names its own run directory"


def test_doctor_and_prefetch_cover_all_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models = ["facebook/opt-125m", "facebook/opt-350m"]
    result = cli("doctor", file, "--json", "--set", f"sweep={{models.actor: {json.dumps(models)}}}")
    missing = [one["message"] for one in json.loads(result.stdout)["findings"] if one["check"] == "hub"]
    assert all(any(name in line for line in missing) for name in models)
    sweep = load_any(file, [f"sweep={{models.actor: {json.dumps(models)}, seed: [1, 2]}}"])
    assert [item.name for item in items(*specs_of(sweep)) if item.kind == "model"] == models
