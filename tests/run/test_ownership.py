"""A run directory that another user could have written to is refused before anything in it is loaded."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.prepare import claim
from hpc_rlhf.run import ownership
from hpc_rlhf.run.layout import RunDir
from tests.launch.specs import make_spec

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


class Planted:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.left), "w")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.stage("sft").logs.mkdir(parents=True)
    (run.stage("sft").logs / "7_submitted.pkl").write_bytes(pickle.dumps(Planted(tmp_path / "left")))
    (run.stage("sft").checkpoints / "step-00000001").mkdir(parents=True)
    (run.stage("sft").checkpoints / "step-00000001/optim.pt").touch()
    (run.stage("sft").logs / "7_0_log.err").touch()
    return run


def test_own_and_missing_folders_are_accepted(run: RunDir) -> None:
    ownership.check(run)
    ownership.check(RunDir(run.path / "no such"))


@pytest.mark.parametrize("folder", [".", "stages", "stages/sft/logs", "stages/sft/checkpoints/step-00000001"])
def test_a_world_writable_folder_is_refused(run: RunDir, folder: str) -> None:
    (run.path / folder).chmod(0o777)
    with pytest.raises(HpcRlhfError, match="it is world-writable") as error:
        ownership.check(run)
    assert error.value.where == str(run.path / folder)


@as_root
@pytest.mark.parametrize(
    "file", [".", "stages/sft/logs/7_submitted.pkl", "stages/sft/checkpoints/step-00000001/optim.pt"]
)
def test_a_file_of_another_user_is_refused(run: RunDir, file: str) -> None:
    os.chown(run.path / file, NOBODY, -1)
    with pytest.raises(HpcRlhfError, match="belongs to another user") as error:
        ownership.check(run)
    assert error.value.where == str(run.path / file)


@as_root
def test_a_log_that_another_user_owns_is_harmless(run: RunDir) -> None:
    os.chown(run.stage("sft").logs / "7_0_log.err", NOBODY, -1)
    ownership.check(run)


def test_launchers_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(HpcRlhfError, match="world-writable"), claim(make_spec(tmp_path / "run"), "test"):
        pass


@pytest.mark.parametrize("entry", ["rank", "task"])
def test_a_rank_refuses_it_before_it_unpickles_anything(run: RunDir, tmp_path: Path, entry: str) -> None:
    logs = run.stage("sft").logs
    logs.chmod(0o777)
    args = [str(logs)] if entry == "rank" else [str(run.path), "sft"]
    slurm = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    command = [sys.executable, "-m", f"hpc_rlhf.{entry}", *args]
    refused = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **slurm})
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"hpc-rlhf: {logs}: it is world-writable")
    assert not (tmp_path / "left").exists()
    if entry == "rank":  # with safe permissions the pickle is loaded
        logs.chmod(0o700)
        subprocess.run(command, capture_output=True, env={**os.environ, **slurm})
        assert (tmp_path / "left").exists()
