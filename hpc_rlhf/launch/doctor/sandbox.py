"""Checks the sandbox that code rewards run the code of responses in."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence

from hpc_rlhf import safe_path
from hpc_rlhf.launch.doctor.finding import Finding, error, ok
from hpc_rlhf.spec.job import JobSpec

_SECONDS = 150


def check(spec: JobSpec, stages: Sequence[str]) -> list[Finding]:
    """Run a test of a program on this machine in each image that code rewards of some stages use."""
    items = [item for stage in stages for item in spec.rewards.get(stage, ())]
    return list(map(_try, dict.fromkeys(item.image for item in items if item.image is not None)))


def _try(image: str) -> Finding:
    command = safe_path.module("hpc_rlhf.train.rewards.code", image)
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        why = json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        why = f"ran no test within {_SECONDS} s"
    except ValueError:
        why = f"failed: {(process.stderr.strip() or f'exit code {process.returncode}').splitlines()[-1]}"
    if why is None:
        return ok("sandbox", f"code runs isolated in {image}")
    fix = "load Apptainer in slurm.setup, such as `module load apptainer`, or ask an administrator to install it"
    if "PATH" not in why:
        start = "apptainer exec --containall --no-home --net --network none"
        fix = f"see the whole error with: {start} {image} python3 -V; Apptainer needs user namespaces or setuid"
    return error("sandbox", f"the reward code {why}", fix)
