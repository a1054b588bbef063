"""Checks by the estimates of ``hpc-rlhf plan`` whether each stage fits its GPUs."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.stage_memory import RESERVE, run_memory
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.spec.job import JobSpec

_FIX = "raise zero, lower micro_batch, or set both to auto; hpc-rlhf plan shows what uses the memory"


def check(spec: JobSpec, stages: Collection[str] | None = None) -> Iterator[Finding]:
    """A finding for each stage with ``slurm.gpu``, or for those among ``stages``."""
    for stage, memory in run_memory(spec).items():
        if stages is not None and stage not in stages:
            continue
        if isinstance(memory, HpcRlhfError):
            if spec.stage(stage).slurm.gpu is not None:
                fix = memory.hint or "see hpc-rlhf plan"
                yield warning("memory", f"cannot be estimated: {memory.message}", fix).at(stage)
        elif memory.gpu is not None:
            sizes = f"{memory.held / 2**30:.1f} of {memory.gpu / 2**30:.1f} GiB on each GPU"
            used = f"an estimated {sizes}, at the peak in its {memory.fullest}"
            if memory.held > memory.gpu:
                finding = error("memory", f"does not fit: {used}", _FIX)
            elif not memory.fits:
                need = f"CUDA and NCCL need about {RESERVE:.0%}"
                finding = warning("memory", f"tight: {used}; {need}", _FIX)
            else:
                finding = ok("memory", used)
            yield finding.at(stage)
