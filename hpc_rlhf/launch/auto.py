"""Chooses what a spec leaves to `auto`: of all combinations that fit the GPU, the one whose steps are estimated fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError, SpecError
from hpc_rlhf.estimate.stage_memory import RESERVE, stage_memory
from hpc_rlhf.estimate.step_time import step_parts
from hpc_rlhf.launch.prepare import differences, has_trained, is_harmless
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.auto import OFFLOADS
from hpc_rlhf.spec.batch import data_ranks, derive_batch
from hpc_rlhf.spec.gpus import gpu_bytes, gpu_names, named_gpu
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import in_order, read_spec
from hpc_rlhf.spec.stages import EVALUATION
from hpc_rlhf.spec.sweep import Sweep, load_any
from hpc_rlhf.spec.training import ReferredSpec, TrainingSpec

# Estimates closer than this are as good as equal: the simpler one wins.
_EQUAL = 1.01


@dataclass(frozen=True)
class Candidate:
    """One combination of what is left to auto.

    Attributes:
        fields: of the stage.
        seconds: of a step, estimated.
        held: bytes of a GPU, estimated.
        fits: whether that leaves enough of it.
    """

    fields: Mapping[str, Any]
    seconds: float
    held: int
    fits: bool

    @property
    def burden(self) -> tuple[int, int, float]:
        """What is simpler comes first: less sharding, fewer offloads; then what is faster."""
        offloads = sum(bool(self.fields.get(field)) for field in OFFLOADS)
        return self.fields.get("zero", 0), offloads, self.seconds


@dataclass(frozen=True)
class Choice:
    """What was chosen for a stage.

    Attributes:
        fields: of the stage.
        considered: all combinations, the fastest first; none where a run keeps what was chosen for it before.
    """

    stage: str
    fields: Mapping[str, Any]
    considered: tuple[Candidate, ...] = ()

    @property
    def why(self) -> str:
        if not self.considered:
            return "as this run was prepared with"
        fitting = [one for one in self.considered if one.fits]
        fastest = fitting[0].fields == self.fields
        best = "the fastest" if fastest else "the simplest within 1 % of the fastest"
        return f"{best} of the {len(fitting)} combinations that fit, out of {len(self.considered)}"


def told(fields: Mapping[str, Any]) -> str:
    """A combination in words."""
    offloads = [field for field in OFFLOADS if field in fields]
    said = [f"{field}: {value}" for field, value in fields.items() if field not in OFFLOADS]
    if offloads:
        on = [field.removeprefix("offload_") for field in offloads if fields[field]]
        said.append(f"offload: {' and '.join(on)}" if on else "no offload")
    return ", ".join(said)


def load(
    path: Path | str, sets: Sequence[str] = (), tell: Callable[[Choice], None] = lambda choice: None
) -> JobSpec | Sweep:
    """Load a user's spec, be it of one run or of a sweep, with everything chosen that it leaves to auto.

    Args:
        path, sets: as ``load_any`` takes them.
        tell: called with each choice; of a sweep, with those of its first run.

    Raises:
        SpecError: all that is wrong with it, or why nothing can be chosen, each with its place.
    """
    spec = load_any(path, sets)
    if isinstance(spec, JobSpec):
        spec, choices = settle(spec)
    else:
        settled = [settle(member.spec) for member in spec.members]
        members = [replace(member, spec=one) for member, (one, _) in zip(spec.members, settled, strict=True)]
        spec, choices = replace(spec, members=tuple(members)), settled[0][1]
    for choice in choices:
        tell(choice)
    return spec


def load_one(path: Path | str, sets: Sequence[str] = ()) -> JobSpec:
    """The same of a spec that makes one run.

    Raises:
        SpecError: as ``load``; or it is a sweep's.
    """
    from hpc_rlhf.spec.load import load_spec

    return settle(load_spec(path, sets))[0]


def settle(spec: JobSpec) -> tuple[JobSpec, list[Choice]]:
    """A spec with numbers wherever it says auto, and how they came about.

    A run keeps what it was prepared with as long as it is the same run, whatever would be chosen today.

    Raises:
        SpecError: nothing can be chosen, or nothing fits; each with its place.
    """
    if not spec.autos:
        return spec, []
    before = _before(spec)
    choices, problems = [], []
    for stage in spec.trained:
        words = spec.autos.get(stage)
        if not words:
            continue
        word, mark = next(iter(words.items()))
        try:
            choice = _kept(spec, before, stage, words) or choose(spec, stage, words)
        except HpcRlhfError as error:
            problems.append(mark.problem(error.message, error.hint, f"stages.{stage}.{word}"))
            continue
        spec = spec.with_stages(**{stage: choice.fields})
        choices.append(choice)
    if problems:
        raise SpecError(in_order(problems))
    return _evaluated_alike(spec).with_autos({}), choices


def choose(spec: JobSpec, stage: str, words: Mapping[str, object]) -> Choice:
    """The best combination for a stage.

    Args:
        words: which of zero, micro_batch and offload are left to auto.

    Raises:
        HpcRlhfError: the GPU or a model is not known, or nothing fits.
    """
    found = sorted(_measured(spec, stage, words), key=lambda candidate: candidate.seconds)
    if not found:
        raise HpcRlhfError("no choice goes together with the stage's other fields")
    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting:
        least = min(found, key=lambda candidate: candidate.held)
        raise HpcRlhfError(
            f"nothing fits: {told(least.fields)} takes least, {least.held / 2**30:.1f} GiB where {_room(spec, stage):.1f} may be taken",
            hint="take more or larger GPUs, shorter sequences, activation_checkpointing: true or lora",
        )
    near = [candidate for candidate in fitting if candidate.seconds <= _EQUAL * fitting[0].seconds]
    best = min(near, key=lambda candidate: candidate.burden)
    return Choice(stage, best.fields, tuple(found))


def _room(spec: JobSpec, stage: str) -> float:
    """GiB of a stage's GPU that tensors may take."""
    return gpu_bytes(spec.stage(stage).slurm.gpu or "") * (1 - RESERVE) / 2**30


def _measured(spec: JobSpec, name: str, words: Mapping[str, object]) -> Iterator[Candidate]:
    stage = spec.stage(name)
    assert isinstance(stage, TrainingSpec)
    if named_gpu(stage.slurm.gpu) is None or not stage.slurm.gpus_per_node:
        raise HpcRlhfError(
            "auto needs to know the GPU" if stage.slurm.gpus_per_node else "auto needs GPUs",
            hint=f"set slurm.gpu to one of {', '.join(gpu_names())}",
        )
    for fields in _combinations(stage, name, words):
        tried = spec.with_stages(**{name: fields})
        try:
            _check(tried, name)
        except ValueError:
            continue
        memory = stage_memory(tried, name)
        yield Candidate(fields, sum(step_parts(tried, name).values()), memory.held, bool(memory.fits))


def _combinations(
    stage: TrainingSpec, name: str, words: Mapping[str, object]
) -> Iterator[dict[str, int | bool]]:
    axes: dict[str, Sequence[int | bool]] = {}
    if "zero" in words:
        axes["zero"] = range(4)
    if "micro_batch" in words:
        assert stage.global_batch is not None
        share = stage.global_batch // data_ranks(stage, name)
        axes["micro_batch"] = [size for size in range(1, share + 1) if share % size == 0]
    if "offload" in words:
        axes |= {"offload_optimizer": (False, True), "offload_params": (False, True)}
        if isinstance(stage, ReferredSpec):
            axes["offload_frozen"] = (False, True)
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _check(spec: JobSpec, name: str) -> None:
    """Raises ValueError where a stage's fields do not go together."""
    stage = spec.stage(name)
    stage.check_strategy()
    if "critic" in stage.strategies:
        stage.strategies["critic"].check_strategy()
    derive_batch(stage, name)


def _before(spec: JobSpec) -> JobSpec | None:
    """The spec that the run directory holds already, of the same run."""
    run = RunDir(Path(spec.run_dir))
    if not run.job_yaml.exists():
        return None
    old = read_spec(run.job_yaml)
    if has_trained(run):
        return old
    left = {f"stages.{stage}.{field}" for stage, words in spec.autos.items() for field in _fields(words)}
    changes = [path for path, _, _ in differences(old, spec) if path not in left and not is_harmless(path)]
    return None if changes else old


def _fields(words: Mapping[str, object]) -> list[str]:
    return [field for word in words for field in (OFFLOADS if word == "offload" else (word,))]


def _kept(spec: JobSpec, before: JobSpec | None, name: str, words: Mapping[str, object]) -> Choice | None:
    """What a run was prepared with, if its stage can still be that."""
    if before is None or name not in before.trained:
        return None
    old = before.stage(name)
    fields = {field: getattr(old, field) for field in _fields(words) if hasattr(old, field)}
    kept = spec.with_stages(**{name: fields})
    try:
        _check(kept, name)
    except ValueError:
        return None
    return Choice(name, fields)


def _evaluated_alike(spec: JobSpec) -> JobSpec:
    """The same, with the evaluation like the last stage that trains, where it says auto or follows that."""
    words = spec.autos.get(EVALUATION.name)
    if not words:
        return spec
    last = spec.stage(spec.trained[-1])
    fields = {word: getattr(last, word) for word in words if word != "offload"}
    if "offload" in words or "zero" in words:
        zero = fields.get("zero", spec.stage(EVALUATION.name).zero)
        fields["offload_params"] = last.offload_params and zero == 3
    return spec.with_stages(**{EVALUATION.name: fields})
