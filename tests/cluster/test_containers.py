"""Stages in containers on the real Slurm: under Apptainer, if installed, and under a stand-in for pyxis.

From inside the image Slurm's commands cannot be reached, so a stage that is preempted leaves a request to be requeued.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.cluster.chain import Chain, assert_went_on_once, run_preempted
from tests.cluster.cluster import CHECKOUT

CHAIN = CHECKOUT / "tests/cluster/jobs/chain.yaml"
STAND_IN = CHECKOUT / "tests/cluster/stand_in"
APPTAINER = shutil.which("apptainer", path=f"{os.environ['PATH']}:{CHECKOUT}/.venv/apptainer/usr/bin")
# The host's libraries, and this Python with everything installed into it.
MOUNTS = sorted(
    {str(folder) for folder in ("/usr/lib", "/usr/lib64", CHECKOUT, sys.prefix) if Path(folder).exists()}
    | {sys.base_prefix if sys.base_prefix != "/usr" else str(Path(sys.executable).resolve())}
)


PROGRAMS = {"apptainer": APPTAINER and Path(APPTAINER).parent, "pyxis": STAND_IN}
NODES = {"apptainer": "node1", "pyxis": "node2"}


def make_image(image: Path) -> Path:
    """A folder with a shell and mount points; its python3 is this one."""
    for folder in ("bin", "etc", "proc", "sys", "dev", "tmp", "usr", ".singularity.d/env"):
        (image / folder).mkdir(parents=True)
    for link in ("lib", "lib64"):
        (image / link).symlink_to(f"usr/{link}")
    for program in ("sh", "env"):
        shutil.copy(f"/bin/{program}", image / "bin")
    for names in ("passwd", "group"):
        shutil.copy(f"/etc/{names}", image / "etc")
    path = f"PATH={Path(sys.executable).parent}:/bin\n"
    (image / "etc/environment").write_text(path)
    (image / ".singularity.d/env/90-environment.sh").write_text(f"export {path}")
    return image


def in_container(cluster: Cluster, folder: Path, runtime: str) -> Chain:
    image = make_image(folder / "image")
    container = {"runtime": runtime, "image": str(image), "mounts": MOUNTS}
    # Some sandboxes withhold capabilities from root, and Apptainer then cannot pass on all of them.
    # The stand-in is a Python script, and a newer Slurm's system has no Python of its own.
    programs = shlex.quote(f"{PROGRAMS[runtime]}:{Path(sys.executable).parent}")
    setup = ["export OMP_NUM_THREADS=1 APPTAINER_NO_PRIVS=1", f"export PATH={programs}:$PATH"]
    slurm = {
        "partition": "low", "nodes": 1, "nodelist": NODES[runtime], "container": container, "setup": setup,
    }  # fmt: skip
    alone = ("stages.reward=null", "stages.ppo=null")
    sets = (*alone, *(f"slurm.{name}={json.dumps(value)}" for name, value in slurm.items()))
    return Chain(cluster, CHAIN, folder / "run", sets)


@pytest.fixture(scope="module")
def chains(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chain]:
    """One in each available kind of container, all at once, preempted once and run to the end."""
    chains = {
        runtime: in_container(cluster, tmp_path_factory.mktemp(runtime), runtime)
        for runtime, programs in PROGRAMS.items()
        if programs
    }
    with ThreadPoolExecutor(len(chains)) as pool:
        list(pool.map(run_preempted, chains.values(), map(NODES.__getitem__, chains)))
    return chains


@pytest.mark.parametrize("runtime", PROGRAMS)
def test_a_preempted_stage_resumes(chains: dict[str, Chain], runtime: str) -> None:
    if runtime not in chains:
        pytest.skip("no apptainer (scripts/install-apptainer.sh installs it on Debian)")
    assert_went_on_once(chains[runtime], 1)
    logs = chains[runtime].run.stage("sft").logs
    assert "Exited with exit code 75" in (logs / f"{chains[runtime].job_id('sft')}_batch.log").read_text()
