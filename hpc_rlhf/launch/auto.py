"""Resolves `auto` in a spec: of all combinations that fit the GPU, the one estimated to be fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError, SpecError
from hpc_rlhf.estimate.stage_memory import RESERVE, stage_memory
from hpc_rlhf.estimate.step_time import step_parts
from hpc_rlhf.launch.changes import differences, has_trained, is_harmless
from hpc_rlhf.run import acting
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.auto import OFFLOADS
from hpc_rlhf.spec.batch import data_ranks, derive_batch
from hpc_rlhf.spec.gpus import GPUS, gpu_bytes
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import continued, in_order, load_spec, read_spec
from hpc_rlhf.spec.stages import EVALUATION
from hpc_rlhf.spec.sweep import Sweep, load_any
from hpc_rlhf.spec.training import ReferredSpec, TrainingSpec

# Of combinations whose estimates are closer than this, the simplest wins.
_EQUAL = 1.01


@dataclass(frozen=True)
class Candidate:
    """One combination of the fields that are left to auto: the estimated seconds of a step and the bytes held on
    each GPU, and whether these leave enough of it."""

    fields: Mapping[str, Any]
    seconds: float
    held: int
    fits: bool

    @property
    def complexity(self) -> tuple[int, int, float]:
        """Sort key: less sharding first, then fewer offloads, then faster steps."""
        offloads = sum(bool(self.fields.get(field)) for field in OFFLOADS)
        return self.fields.get("zero", 0), offloads, self.seconds


@dataclass(frozen=True)
class Choice:
    """The fields chosen for a stage, and all combinations considered, fastest first; none if the run keeps an
    earlier choice."""

    stage: str
    fields: Mapping[str, Any]
    considered: tuple[Candidate, ...] = ()

    @property
    def why(self) -> str:
        if not self.considered:
            return "as this run was prepared"
        fitting = [one for one in self.considered if one.fits]
        fastest = fitting[0].fields == self.fields
        best = "the fastest" if fastest else "the simplest within 1 % of the fastest"
        return f"{best} of the {len(fitting)} combinations that fit, out of {len(self.considered)}"


def describe(fields: Mapping[str, Any]) -> str:
    """A combination as text."""
    offloads = [field for field in OFFLOADS if field in fields]
    words = [f"{field}: {value}" for field, value in fields.items() if field not in OFFLOADS]
    if offloads:
        on = [field.removeprefix("offload_") for field in offloads if fields[field]]
        words.append(f"offload: {' and '.join(on)}" if on else "no offload")
    return ", ".join(words)


def load(
    path: Path | str, sets: Sequence[str] = (), on_choice: Callable[[Choice], None] = lambda choice: None
) -> JobSpec | Sweep:
    """Load a user's spec, of a run or a sweep, and resolve auto in it. ``on_choice`` is called with each choice; for
    a sweep, with those of its first run.

    Raises:
        SpecError: every error in it, or why nothing can be chosen, each with its line.
        HpcRlhfError: it is the spec of a run that was moved or copied, and names the folder where that was made.
    """
    _refuse_moved(Path(path), sets)
    spec = load_any(path, sets)
    if isinstance(spec, JobSpec):
        spec, choices = resolve(spec)
    else:
        resolved = [resolve(member.spec) for member in spec.members]
        members = [replace(member, spec=one) for member, (one, _) in zip(spec.members, resolved, strict=True)]
        spec, choices = replace(spec, members=tuple(members)), resolved[0][1]
    for choice in choices:
        on_choice(choice)
    return spec


def load_one(path: Path | str, sets: Sequence[str] = ()) -> JobSpec:
    """Load the spec of a single run, and resolve auto in it. Raises as ``load``, and SpecError if it is a sweep."""
    _refuse_moved(Path(path), sets)
    return resolve(load_spec(path, sets))[0]


def _refuse_moved(path: Path, sets: Sequence[str]) -> None:
    if (run := acting.run_of(path)) is not None and not any(option.startswith("run_dir=") for option in sets):
        acting.check_place(run)


def resolve(spec: JobSpec) -> tuple[JobSpec, list[Choice]]:
    """A spec without auto, and the choices made.

    A prepared run keeps its choices as long as its spec is the same otherwise, and the defaults of the version that
    began it.

    Raises:
        SpecError: nothing can be chosen or nothing fits, each with its line.
    """
    run = RunDir(Path(spec.run_dir))
    begun = read_spec(run.job_yaml) if run.job_yaml.exists() else None
    if begun is not None:
        spec = continued(spec, begun)
    if not spec.autos:
        return spec, []
    before = None if begun is None else _same_run(spec, begun, run)
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
        HpcRlhfError: the GPU or a model is unknown, or nothing fits.
    """
    candidates = sorted(_candidates(spec, stage, words), key=lambda candidate: candidate.seconds)
    if not candidates:
        raise HpcRlhfError("no combination is compatible with the stage's other fields")
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        least = min(candidates, key=lambda candidate: candidate.held)
        usable = gpu_bytes(spec.stage(stage).slurm.gpu or "") * (1 - RESERVE)
        raise HpcRlhfError(
            f"nothing fits: {describe(least.fields)} needs least, {least.held / 2**30:.1f} GiB of "
            f"{usable / 2**30:.1f} usable",
            hint="use more or larger GPUs, shorter sequences, activation_checkpointing: true or lora",
        )
    near = [candidate for candidate in fitting if candidate.seconds <= _EQUAL * fitting[0].seconds]
    best = min(near, key=lambda candidate: candidate.complexity)
    return Choice(stage, best.fields, tuple(candidates))


def _candidates(spec: JobSpec, name: str, words: Mapping[str, object]) -> Iterator[Candidate]:
    stage = spec.stage(name)
    assert isinstance(stage, TrainingSpec)
    if stage.slurm.gpu not in GPUS or not stage.slurm.gpus_per_node:
        raise HpcRlhfError(
            "auto needs the name of the GPU" if stage.slurm.gpus_per_node else "auto needs GPUs",
            hint=f"set slurm.gpu to one of {', '.join(GPUS)}",
        )
    for fields in _combinations(stage, name, words):
        candidate = spec.with_stages(**{name: fields})
        try:
            _check(candidate, name)
        except ValueError:
            continue
        memory = stage_memory(candidate, name)
        yield Candidate(fields, sum(step_parts(candidate, name).values()), memory.held, bool(memory.fits))


def _combinations(stage: TrainingSpec, name: str, words: Mapping[str, object]) -> Iterator[dict[str, int | bool]]:
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
    """Raise ValueError if a stage's fields are incompatible."""
    stage = spec.stage(name)
    stage.check_strategy()
    if "critic" in stage.strategies:
        stage.strategies["critic"].check_strategy()
    derive_batch(stage, name)


def _same_run(spec: JobSpec, old: JobSpec, run: RunDir) -> JobSpec | None:
    """The spec in the run directory, if it is the same run."""
    if has_trained(run):
        return old
    open_fields = {f"stages.{stage}.{field}" for stage, words in spec.autos.items() for field in _fields(words)}
    changes = [path for path, _, _ in differences(old, spec) if path not in open_fields and not is_harmless(path)]
    return None if changes else old


def _fields(words: Mapping[str, object]) -> list[str]:
    return [field for word in words for field in (OFFLOADS if word == "offload" else (word,))]


def _kept(spec: JobSpec, before: JobSpec | None, name: str, words: Mapping[str, object]) -> Choice | None:
    """The choice that a run was prepared with, if it is still possible."""
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
    """The spec with the evaluation's auto resolved to the fields of the last stage that trains."""
    words = spec.autos.get(EVALUATION.name)
    if not words:
        return spec
    last = spec.stage(spec.trained[-1])
    fields = {word: getattr(last, word) for word in words if word != "offload"}
    if "offload" in words or "zero" in words:
        zero = fields.get("zero", spec.stage(EVALUATION.name).zero)
        fields["offload_params"] = last.offload_params and zero == 3
    return spec.with_stages(**{EVALUATION.name: fields})
