"""``python -m hpc_rlhf.launch.doctor.probe FOLDER STAGE,… OP…``: check the node it runs on.

Writes a list of findings to FOLDER/NODE.json, in the run directory.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor import hub, machine, packages, sandbox, site, storage, vllm
from hpc_rlhf.launch.doctor.finding import Finding, error
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.slurm import commands
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec

_FROM_NODES = "set slurm.heal.enabled: false, or ask an administrator to allow nodes to submit jobs"


def examine(spec: JobSpec, stages: Sequence[str], folder: Path, ops: Sequence[str]) -> list[Finding]:
    """Check a node that runs some stages with the same Slurm settings."""
    settings = spec.stage(stages[0]).slurm
    precisions = {spec.stage(name).precision for name in spec.stage_names}
    findings = [storage.check_writes(folder, RunDir(Path(spec.run_dir))), *packages.check()]
    findings += machine.examine(ops, settings.gpus_per_node, precisions, settings.ranks > 1)
    findings += sandbox.check(spec, stages)
    findings += vllm.check(spec, stages, settings.gpus_per_node)
    if commands.available():
        try:
            findings.append(site.check_clock())
        except HpcRlhfError as problem:
            message = f"the controller does not respond to this node: {problem.message}"
            findings.append(error("slurm", message, _FROM_NODES))
    elif settings.heal.enabled and settings.container is None:
        findings.append(error("slurm", "Slurm's commands are not on PATH, but sentinels need them", _FROM_NODES))
    return [*findings, *hub.check([spec])]


def main(folder: Path, stages: Sequence[str], ops: Sequence[str]) -> None:
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    findings = examine(read_spec(folder / "spec.yaml"), stages, folder, ops)
    write_atomically(folder / f"{node}.json", json.dumps([asdict(finding) for finding in findings]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
