"""A save that is killed at any call that touches the disk leaves a run that continues as if undisturbed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("faults.c")


@pytest.mark.train
@pytest.mark.parametrize(("module", "at_least"), [("faults", 25), ("faults_engine", 50)])
def test_a_save_can_be_killed_at_each_of_its_calls(tmp_path: Path, module: str, at_least: int) -> None:
    """All of them: folders made, files opened, each write cut in half, flushed, renamed, and the old ones removed. Of a
    stand-in for an engine, and of DeepSpeed's."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler: a save is not killed at each of its calls")
    library = tmp_path / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", f"tests.train.{module}", str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["killed"] == found["calls"] >= at_least
