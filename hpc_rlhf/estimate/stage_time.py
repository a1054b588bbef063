"""How long stages take: the number of their steps, times the estimate of ``step_time``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.sample_counts import expected_samples
from hpc_rlhf.estimate.step_time import step_parts
from hpc_rlhf.slurm.jobs import time_limit
from hpc_rlhf.spec.batch import derive_batch
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.rollout_checks import vllm_of
from hpc_rlhf.spec.sizes import EVALUATED_PROMPTS, EVALUATED_ROWS
from hpc_rlhf.spec.stages import EvalSpec, GrpoSpec
from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.spec.training import TrainingSpec


@dataclass(frozen=True)
class StageTime:
    """How long a stage takes.

    Attributes:
        parts: seconds of a step by part: training, optimizer, messages, offload, and decoding and scoring of responses.
        samples: samples of a step; in GRPO, responses.
        expected: samples that the data have for the stage; None if unknown here.
        steps: steps of the whole stage, 1 for an evaluation; None if unknown.
        gpus: GPUs of its job.
        limit: seconds that one attempt may take; None without a limit.
        evaluations: seconds of all evaluations on held-out data during training, roughly.
    """

    parts: dict[str, float]
    samples: int
    expected: int | None
    steps: int | None
    gpus: int
    limit: int | None
    evaluations: float = 0.0

    @property
    def step_seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float | None:
        """Seconds of all steps and evaluations, without startup, checkpoints and the queue."""
        return None if self.steps is None else self.steps * self.step_seconds + self.evaluations

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.gpus / 3600

    @property
    def per_thousand(self) -> float:
        """Seconds for each 1,000 samples."""
        return 1000 * self.step_seconds / self.samples

    @property
    def attempts(self) -> int | None:
        """Number of attempts that the time limit makes necessary."""
        if self.seconds is None:
            return None
        return 1 if self.limit is None else max(1, -int(-self.seconds // self.limit))


def stage_time(spec: JobSpec, name: str) -> StageTime:
    """How long a stage takes.

    Raises:
        HpcRlhfError: the speed of slurm.gpu is unknown, or a model's configuration is not here.
    """
    stage, parts = spec.stage(name), step_parts(spec, name)
    rollout, limit = vllm_of(stage), time_limit(stage.slurm.time)
    gpus = (stage.slurm.nodes + (rollout.own_nodes if rollout else 0)) * stage.slurm.gpus_per_node
    if isinstance(stage, EvalSpec):
        return StageTime(parts, stage.prompts, stage.prompts, 1, gpus, limit)
    assert isinstance(stage, TrainingSpec)
    batch = derive_batch(stage, name)
    samples = batch.global_ * (stage.minibatches if isinstance(stage, PolicySpec) else 1)
    expected = expected_samples(spec, name)
    steps = stage.max_steps
    if expected is not None:
        rows = samples // stage.group_size if isinstance(stage, GrpoSpec) else samples
        available = max(1, expected * stage.epochs // rows)
        steps = available if steps is None else min(available, steps)
    time = StageTime(parts, samples, expected, steps, gpus, limit)
    return replace(time, evaluations=_evaluations(spec, name, stage, time))


def _evaluations(spec: JobSpec, name: str, stage: TrainingSpec, time: StageTime) -> float:
    """``StageTime.evaluations``: a forward pass is a third of training; PPO and GRPO generate and score."""
    if stage.eval_every is None or time.steps is None or time.expected is None:
        return 0.0
    held_out = time.expected * spec.held_out(name) / (1 - spec.held_out(name))
    scoring = time.parts.get("scoring", 0.0)
    if isinstance(stage, PolicySpec):
        rows, work = min(held_out, EVALUATED_PROMPTS), scoring + time.parts["decoding"]
    else:
        rows, work = min(held_out, EVALUATED_ROWS), scoring + time.parts["training"] / 3
    return time.steps // stage.eval_interval(time.steps) * work * rows / time.samples


def run_times(spec: JobSpec) -> dict[str, StageTime | HpcRlhfError]:
    """How long each stage takes, or why it is unknown."""
    times: dict[str, StageTime | HpcRlhfError] = {}
    for name in spec.stage_names:
        try:
            times[name] = stage_time(spec, name)
        except HpcRlhfError as error:
            times[name] = error
    return times


def chain_seconds(spec: JobSpec, times: dict[str, StageTime | HpcRlhfError]) -> float | None:
    """Seconds from the start of the first stage to the end of the last; None if a stage's time is unknown."""
    ends: dict[str, float] = {}
    for name in spec.stage_names:
        time = times[name]
        if isinstance(time, HpcRlhfError) or time.seconds is None:
            return None
        ends[name] = time.seconds + max((ends[need] for need in spec.needs(name)), default=0.0)
    return max(ends.values())
