"""What every job file in jobs/ renders to, held line by line. ``pytest --update-golden`` writes it anew."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import render
from hpc_rlhf.spec.load import load_spec

CHECKOUT = Path(__file__).parents[2]
GOLDEN = CHECKOUT / "tests/golden"
JOBS = sorted((CHECKOUT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_job_file_renders_to_its_golden_scripts(
    job: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setattr(sys, "executable", "/opt/hpc-rlhf/bin/python")
    render(make_plan(load_spec(job, [f"run_dir=/scratch/runs/{job.stem}"])), tmp_path, job.parent)
    golden = GOLDEN / job.stem
    if request.config.getoption("--update-golden"):
        shutil.rmtree(golden, ignore_errors=True)
        shutil.copytree(tmp_path, golden)
    rendered = {path.name: path.read_text() for path in tmp_path.iterdir()}
    held = {path.name: path.read_text() for path in golden.iterdir()}
    assert sorted(rendered) == sorted(held)
    for name in rendered:
        assert rendered[name] == held[name], f"{golden / name} differs"


def test_no_golden_outlives_its_job_file() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {job.stem for job in JOBS}


def test_golden_scripts_are_sound_bash() -> None:
    scripts = sorted(GOLDEN.glob("*/*.sbatch"))
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    program = shellcheck if shellcheck.exists() else "shellcheck"
    done = subprocess.run([program, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.train
def test_golden_deepspeed_configs_use_only_keys_that_deepspeed_knows() -> None:
    """DeepSpeed passes over an unknown key at the top level, such as zero_optimisation, without a word."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization"}
    blocks = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    configs = sorted(GOLDEN.glob("*/*.ds_config.json"))
    assert configs
    for path in configs:
        config = json.loads(path.read_text())
        assert set(config) <= known, path
        assert {"train_batch_size", "optimizer", "scheduler"}.isdisjoint(config), path
        for name in blocks.keys() & config.keys():
            blocks[name](**config[name])
