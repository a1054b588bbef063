"""The results of a run's finished stages, read from their manifests and samples."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, TypedDict

from hpc_rlhf.observe.format import number
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import STAGE_NAMES, kind_of


@dataclass(frozen=True)
class StageResult:
    """The result of a finished stage, as its manifest has it."""

    step: int | None
    seconds: float | None
    metrics: Mapping[str, Any]


class Sample(TypedDict, total=False):
    """A stage's response to a held-out prompt at its end, beside that of the model it started from."""

    kind: str
    prompt: str
    answer: str | None
    reward: float | None
    sft_answer: str | None
    sft_reward: float | None


def stage_results(run: RunDir) -> dict[str, StageResult]:
    """The results of the stages that have a manifest, by stage."""
    manifests = {stage: manifest.read(run.stage(stage).model) for stage in STAGE_NAMES}
    return {
        stage: StageResult(facts.get("step"), facts.get("seconds"), facts.get("metrics", {}))
        for stage, facts in manifests.items()
        if facts is not None
    }


def final_samples(run: RunDir, stage: str) -> list[Sample]:
    """A stage's samples at its end, one per prompt."""
    try:
        lines = run.stage(stage).samples.read_text(encoding="utf-8").split("\n")
    except OSError:
        return []
    samples: dict[str, Sample] = {}
    for line in lines:
        try:
            sample: Sample = json.loads(line)
        except ValueError:
            continue
        if sample.get("kind") == "final":
            samples[sample["prompt"]] = sample
    return list(samples.values())


def describe_result(stage: str, metrics: Mapping[str, Any]) -> str:
    """The result of a stage in words."""
    if metrics.get("win_rates"):
        rates = metrics["win_rates"].items()
        return ", ".join(f"{name} wins {rate:.0%} against {metrics['base']}" for name, rate in rates)
    return _Numbers().vformat(kind_of(stage).result, (), defaultdict(lambda: None, metrics))


class _Numbers(Formatter):
    """Formats metrics with three significant digits, and missing ones as a dash."""

    def format_field(self, value: float | None, format_spec: str) -> str:
        return format(value, format_spec) if format_spec and value is not None else number(value)
