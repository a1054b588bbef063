"""The metrics that a search can improve: which a spec has, and between which runs they compare."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.stage_inputs import fingerprint
from hpc_rlhf.spec.stages import BASE, EVALUATION, Data, kind_of

# Metrics of the evaluation by what they need.
_SCORED = ("reward", "reward_gain", "win_rate")
_VERIFIED = ("accuracy", "accuracy_gain")
_AGAINST_BASE = ("reward_gain", "win_rate", "accuracy_gain")


@dataclass(frozen=True)
class Metric:
    """A metric of a stage."""

    stage: str
    name: str

    @classmethod
    def of(cls, text: str) -> Metric:
        """The metric with a name such as eval.reward."""
        stage, _, name = text.partition(".")
        return cls(stage, name)

    @property
    def lower_is_better(self) -> bool:
        return self.name in kind_of(self.stage).lower_is_better

    @property
    def compared(self) -> str:
        """Its name in comparisons, in which metrics of the evaluation come without their stage."""
        return self.name if self.stage == EVALUATION.name else f"{self.stage}.{self.name}"

    @property
    def relative(self) -> str:
        """What its values depend on besides the model, in words."""
        if self.name == "perplexity":
            return "which depends on the tokenizer"
        if self.name in _AGAINST_BASE:
            return "which compares with the run's own first model"
        return "which depends on the run's own rewards"

    def scale(self, spec: JobSpec) -> object:
        """What a metric's values are relative to: those of two runs compare if it is equal."""
        if self.name in ("reward", "reward_gain"):
            judge = fingerprint(spec, spec.judge) if spec.judge else spec.finished_reward
            scale: tuple[object, ...] = (judge, spec.rewards, spec.evaluated_rewards)
        elif self.name == "perplexity":
            scale = (spec.models.actor,)
        elif self.stage == EVALUATION.name:
            scale = (spec.evaluated_rewards,)
        else:
            scale = ()
        if self.name not in _AGAINST_BASE:
            return scale
        bases = [name for name in spec.trained if name == BASE.name or kind_of(name).makes == "base model"]
        return (*scale, fingerprint(spec, bases[-1]) if bases else spec.models.actor)


def halving_metrics_of(spec: JobSpec) -> list[str]:
    """The names of the metrics that the stages of a spec measure on held-out data while they train."""
    return [
        f"{name}.{metric}"
        for name in spec.trained
        for metric in kind_of(name).held_out
        if metric in kind_of(name).ranking and metric != "loss" and getattr(spec.stage(name), "eval_every", None)
    ]


def metrics_of(spec: JobSpec) -> list[str]:
    """The names of the metrics that the runs of a spec have."""
    names, last = [], kind_of(spec.trained[-1])
    if spec.evaluation is not None and last.makes_policy:
        names.append("perplexity")
        if spec.judge or spec.finished_reward:
            names += _SCORED
        if spec.evaluated_rewards:
            names += _VERIFIED
            names += [f"pass@{2**power}" for power in range(1, spec.evaluation.samples.bit_length())]
        if last.data is Data.PAIRS:
            names.append("pair_accuracy")
        if last is BASE:
            names = [name for name in names if name not in _AGAINST_BASE]
    # A loss depends on how its parts are weighted, such as by DPO's beta, and does not compare.
    trained = [f"{name}.{metric}" for name in spec.trained for metric in kind_of(name).ranking if metric != "loss"]
    return [*(f"{EVALUATION.name}.{name}" for name in names), *trained]
