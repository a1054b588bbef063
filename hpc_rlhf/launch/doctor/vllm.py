"""Checks the Python that vLLM runs in."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from hpc_rlhf.launch.doctor.finding import Finding, error, ok
from hpc_rlhf.spec import rollout_checks
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.rollout import interpreter

# vLLM imports much, and a network file system may be cold.
_SECONDS = 300
_PROGRAM = "import torch, vllm; print('\\n' + vllm.__version__, torch.cuda.device_count())"


def check(spec: JobSpec, stages: Sequence[str], gpus: int) -> list[Finding]:
    """Import vLLM in each Python in which some stages generate responses with it.

    Args:
        gpus: number that it should see.
    """
    rollouts = [rollout for stage in stages if (rollout := rollout_checks.vllm_of(spec.stage(stage)))]
    return [_try(python, gpus) for python in dict.fromkeys(map(interpreter, rollouts))]


def check_files(spec: JobSpec) -> list[Finding]:
    """What is wrong with those Pythons as far as this machine's files show it. Nothing runs."""
    return [error("vllm", wrong, rollout_checks.INSTALL).at(stage) for stage, wrong in rollout_checks.absent(spec)]


def _try(python: str, gpus: int) -> Finding:
    try:
        process = subprocess.run([python, "-P", "-c", _PROGRAM], capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        fix = "put its environment on a faster file system"
        return error("vllm", f"vLLM did not load within {_SECONDS} s in {python}", fix)
    except OSError as problem:
        return error("vllm", f"{python} does not start: {problem.strerror}", rollout_checks.INSTALL)
    if process.returncode:
        reason = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        return error("vllm", f"vLLM does not load in {python}: {reason}", rollout_checks.INSTALL)
    version, count = process.stdout.split()[-2:]
    if int(count) < gpus:
        fix = "install vLLM's build for GPUs: make install-vllm on a machine with one"
        return error("vllm", f"vLLM {version} in {python} finds {count} of the {gpus} GPUs", fix)
    return ok("vllm", f"vLLM {version} in {python}")
