"""Whether each stage fits its GPUs, by the estimates of ``hpc-rlhf plan``."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.stage_memory import RESERVE, Memory, run_memory
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.spec.job import JobSpec

_CURE = "see what takes it (hpc-rlhf plan), and raise zero, lower micro_batch, or set both to auto"


def check(spec: JobSpec) -> Iterator[Finding]:
    """A finding for each stage whose GPU is told by ``slurm.gpu``."""
    for stage, memory in run_memory(spec).items():
        if isinstance(memory, HpcRlhfError):
            if spec.stage(stage).slurm.gpu is not None:
                cure = memory.hint or "see hpc-rlhf plan"
                yield warning("memory", f"it is not known what it takes: {memory.message}", cure).at(stage)
        elif memory.gpu is not None:
            yield _finding(memory, memory.gpu).at(stage)


def _finding(memory: Memory, gpu: int) -> Finding:
    said = f"it takes {memory.held / 2**30:.1f} of the {gpu / 2**30:.1f} GiB of a GPU in its {memory.fullest}"
    if memory.held > gpu:
        return error("memory", f"{said}, by estimate", _CURE)
    if not memory.fits:
        return warning("memory", f"{said}, and CUDA and NCCL want about {RESERVE:.0%}", _CURE)
    return ok("memory", f"{said}, by estimate")
