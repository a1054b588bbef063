"""Checks what a machine has against what the stages need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpc_rlhf import safe_path
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning

# Importing torch from a cold network file system takes a minute or two.
_SECONDS = 240


def examine(
    ops: Sequence[str], gpus: int | None = None, precisions: Iterable[str] = (), spread: bool = False
) -> list[Finding]:
    """Ask torch and DeepSpeed on this machine, in a separate process, and judge what they find.

    Args:
        ops: DeepSpeed ops that the stages need.
        gpus, precisions, spread: as ``check`` takes them.
    """
    command = safe_path.module("hpc_rlhf.train.machine", *ops)
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        facts = json.loads(process.stdout.splitlines()[-1]) if process.stdout else {}
    except subprocess.TimeoutExpired:
        fix = "put the environment on a faster file system, or check with nvidia-smi whether the driver hangs"
        return [error("torch", f"torch and DeepSpeed did not load within {_SECONDS} s", fix)]
    except ValueError:
        facts = {}
    if not facts:
        reason = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        fix = 'see the whole error with: python -c "import torch, deepspeed"'
        return [error("torch", f"torch or DeepSpeed does not load: {reason}", fix)]
    return check(facts, gpus, precisions, spread)


def check(facts: Mapping[str, Any], gpus: int | None, precisions: Iterable[str], spread: bool) -> list[Finding]:
    """Judge a machine.

    Args:
        facts: the output of ``hpc_rlhf.train.machine``.
        gpus: number that a rank should find; None if nothing trains on this machine, as on a login node.
        precisions: precisions of the stages.
        spread: whether a stage has several ranks.
    """
    count = len(facts["gpus"])
    build = f"torch {facts['torch']}, {'CUDA ' + facts['cuda'] if facts['cuda'] else 'built without CUDA'}"
    names = ", ".join(dict.fromkeys(facts["gpus"]))
    if count >= (gpus or 0):
        findings = [ok("torch", f"{build}; {count} GPU{'s' * (count != 1)}{f' ({names})' if names else ''}")]
    elif facts["cuda"]:
        fix = "check that nvidia-smi lists them, and that CUDA_VISIBLE_DEVICES and the driver match this torch"
        findings = [error("torch", f"{build}, but it finds {count} of the {gpus} requested GPUs", fix)]
    else:
        requested = f"{gpus} GPU{'s' * (gpus != 1)} per node"
        problem = f"{build}, but the spec requests {requested}: the stages would train on CPUs"
        fix = "install the torch build for your CUDA driver, or set slurm.gpus_per_node: 0 and ranks_per_node"
        findings = [error("torch", problem, fix)]
    if gpus and count and "bf16" in precisions and not facts["bf16"]:
        findings.append(error("precision", f"{names} does not support bf16", "set precision: fp16 for the stages"))
    if gpus == 0 and "bf16" in precisions and not facts["bf16"]:
        problem = "this processor lacks AVX-512: matrix products in bf16 take tens of times as long as in fp32"
        findings.append(warning("precision", problem, "set precision: fp32 for the stages"))
    if gpus and count and spread and facts["nccl"]:
        findings.append(ok("nccl", facts["nccl"]))
    return [
        *findings,
        ok("deepspeed", f"{facts['deepspeed']} on accelerator {facts['accelerator']}"),
        _ops(facts["ops"]),
    ]


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


def _ops(ops: Mapping[str, Mapping[str, object]]) -> Finding:
    """Check that ops are built, or can be."""
    to_build = sorted(name for name, state in ops.items() if not state["built"])
    programs = {"g++": (os.environ.get("CXX") or "c++").split()[0], "ninja": "ninja"}
    if any(ops[name]["cuda"] for name in to_build):
        programs["nvcc"] = "nvcc"
    folders = os.pathsep.join((os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"))
    absent = [name for name, program in programs.items() if shutil.which(program, path=folders) is None]
    missing, named = " and ".join(absent), " and ".join(to_build)
    if not to_build:
        message = "no DeepSpeed op has to be built"
        return ok("compiler", f"{message}; {missing} would be missing" if absent else message)
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        return error(
            "compiler",
            f"DeepSpeed's {named} must be built here, but {missing} {verb} missing",
            "load a compiler in slurm.setup, such as `module load gcc cuda` (ninja: pip install ninja), or build it "
            f"ahead: {ops[to_build[0]]['variable']}=1 pip install --no-build-isolation deepspeed",
        )
    impossible = [name for name in to_build if not ops[name]["possible"]]
    if impossible:
        message = f"DeepSpeed reports that {' and '.join(impossible)} cannot be built here"
        return warning("compiler", message, "see why with ds_report")
    return ok("compiler", f"available to build DeepSpeed's {named}")
