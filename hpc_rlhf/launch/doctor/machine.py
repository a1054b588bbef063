"""Checks what torch and DeepSpeed find on a machine against what its stages need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning

# Importing torch from a cold network file system takes a minute or two.
_SECONDS = 240


def ask(ops: Sequence[str]) -> dict[str, object] | Finding:
    """The output of ``hpc_rlhf.train.machine``, in a separate process, or a finding if it fails."""
    command = [sys.executable, "-m", "hpc_rlhf.train.machine", *ops]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        facts: dict[str, object] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    except subprocess.TimeoutExpired:
        return error(
            "torch",
            f"torch and DeepSpeed did not load within {_SECONDS} s",
            "put the environment on a faster file system, or check with nvidia-smi whether the driver hangs",
        )
    except ValueError:
        facts = {}
    if not facts:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return error(
            "torch",
            f"torch or DeepSpeed does not load: {reason}",
            'see the whole error with: python -c "import torch, deepspeed"',
        )
    return facts


def ops_needed(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The DeepSpeed ops that rendered DeepSpeed configs need. The built-in templates need none."""
    ops = {"pin_memory"} if os.environ.get("DS_PIN_MEMORY_BACKEND") == "native" else set()
    for config in configs:
        zero = config.get("zero_optimization", {})
        offloads = [zero.get(name, {}) for name in ("offload_optimizer", "offload_param")]
        if any(offload.get("device") == "nvme" for offload in offloads):
            ops.add("async_io")
        if zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"):
            ops.add("quantizer")
    return sorted(ops)


def check(facts: Mapping[str, Any], gpus: int | None, precisions: Iterable[str], spread: bool) -> list[Finding]:
    """Judge a machine.

    Args:
        facts: from ``ask``.
        gpus: number that a rank should find; None if nothing trains on this machine, as on a login node.
        precisions: precisions of the stages.
        spread: whether a stage has several ranks.
    """
    count = len(facts["gpus"])
    build = f"torch {facts['torch']}, {'CUDA ' + facts['cuda'] if facts['cuda'] else 'built without CUDA'}"
    names = ", ".join(dict.fromkeys(facts["gpus"]))
    findings = [ok("torch", f"{build}; {count} GPU{'s' * (count != 1)}{f' ({names})' if names else ''}")]
    if gpus:
        findings = [_gpus(facts, count, gpus, build, findings[0])]
        if count and "bf16" in precisions and not facts["bf16"]:
            findings.append(error("precision", f"{names} does not support bf16", "set precision: fp16 for the stages"))
        if count and spread and facts["nccl"]:
            findings.append(ok("nccl", facts["nccl"]))
    findings.append(ok("deepspeed", f"{facts['deepspeed']} on accelerator {facts['accelerator']}"))
    return [*findings, *_ops(facts["ops"])]


def _gpus(facts: Mapping[str, object], count: int, wanted: int, build: str, sound: Finding) -> Finding:
    if count >= wanted:
        return sound
    if not facts["cuda"]:
        return error(
            "torch",
            f"{build}, but the spec requests {wanted} GPU{'s' * (wanted > 1)} per node: the stages would train on CPUs",
            "install the torch build for your CUDA driver, or set slurm.gpus_per_node: 0 and ranks_per_node",
        )
    return error(
        "torch",
        f"{build}, but it finds {count} of the {wanted} requested GPUs",
        "check that nvidia-smi lists them, and that CUDA_VISIBLE_DEVICES and the driver match this torch",
    )


def _ops(ops: Mapping[str, Mapping[str, object]]) -> list[Finding]:
    """Check that ops are built, or can be."""
    to_build = sorted(name for name, state in ops.items() if not state["built"])
    programs = {"g++": (os.environ.get("CXX") or "c++").split()[0], "ninja": "ninja"}
    if any(ops[name]["cuda"] for name in to_build):
        programs["nvcc"] = "nvcc"
    folders = os.pathsep.join((os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"))
    absent = [name for name, program in programs.items() if shutil.which(program, path=folders) is None]
    if not to_build:
        message = "no DeepSpeed op has to be built"
        return [ok("compiler", message + (f"; {' and '.join(absent)} would be missing" if absent else ""))]
    named = " and ".join(to_build)
    if absent:
        return [
            error(
                "compiler",
                f"DeepSpeed's {named} must be built here, but {' and '.join(absent)} "
                f"{'is' if len(absent) == 1 else 'are'} missing",
                "load a compiler in slurm.setup, such as `module load gcc cuda` (ninja: pip install ninja), "
                f"or build it ahead: {ops[to_build[0]]['variable']}=1 pip install --no-build-isolation "
                "deepspeed",
            )
        ]
    impossible = [name for name in to_build if not ops[name]["possible"]]
    if impossible:
        return [
            warning(
                "compiler",
                f"DeepSpeed reports that {' and '.join(impossible)} cannot be built here",
                "see why with ds_report",
            )
        ]
    return [ok("compiler", f"available to build DeepSpeed's {named}")]
