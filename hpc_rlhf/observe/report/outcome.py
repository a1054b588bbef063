"""What a run came to, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpc_rlhf.observe.format import duration
from hpc_rlhf.observe.report.answers import MODELS
from hpc_rlhf.observe.status import StageStatus
from hpc_rlhf.observe.summary import outcome
from hpc_rlhf.spec.stages import BASE, POLICIES, kind_of

_IN_HAND = frozenset({
    "running", "pending", "waiting", "requeued", "starting", "completing", "configuring", "not started", "stopping"
})  # fmt: skip


_SAID = {
    "failed": "has failed",
    "not started": "has not started",
    "cancelled": "was cancelled",
    "interrupted": "was interrupted",
    "refused": "was refused by Slurm",
    "unknown": "is in an unknown state",
}


def state(statuses: Sequence[StageStatus]) -> str:
    """Of a run in a word: finished, running, in the queue, not started, or stopped."""
    states = {status.state for status in statuses}
    if states == {"done"}:
        return "finished"
    if states <= {"not started"}:
        return "not started"
    if states & {"running", "completing", "stopping"}:
        return "running"
    return "in the queue" if states - {"done"} <= _IN_HAND and states - {"done", "not started"} else "stopped"


def sentence(
    statuses: Sequence[StageStatus], facts: Mapping[str, Mapping[str, Any]], report: Mapping[str, Any] | None
) -> str:
    """What the run achieved; of a run that is not finished, where it stands.

    Args:
        facts: the manifests of the stages that are done.
        report: of the evaluation; None where there is none.
    """
    open_stages = [status for status in statuses if status.state != "done"]
    if open_stages:
        ahead = next((one for one in open_stages if one.state != "not started"), open_stages[0])
        return _standing(ahead, len(statuses) - len(open_stages), len(statuses))
    for name in (model for model in POLICIES if model != BASE.name):
        won = (report or {}).get("models", {}).get(name, {}).get("win_rate")
        if report and won:
            base = MODELS.get(report["base"], report["base"])
            against = (
                "those of the model before training" if report["base"] == "start" else f"those of {base}"
            )
            bounds = f"{100 * won['low']:.0f}–{100 * won['high']:.0f}%"
            return (
                f"{MODELS[name]}’s answers win against {against} on {won['value']:.0%} of "
                f"{report['prompts']} held-out prompts ({bounds}), as the run’s own reward model judges."
            )
    last = [stage for stage in facts if kind_of(stage).trains][-1:] or list(facts)[-1:]
    return " ".join(
        f"{kind_of(stage).title} is done: {outcome(stage, dict(facts[stage]['metrics']))}." for stage in last
    )


def _standing(status: StageStatus, done: int, stages: int) -> str:
    said = f"{done} of {stages} stages done; {status.stage} {_SAID.get(status.state, f'is {status.state}')}"
    if status.step is not None:
        said += f" at step {status.step:,} of {status.total_steps:,}"
    if status.left:
        said += f", with {duration(status.left)} of work left"
    return f"{said}: {status.why}." if status.why else f"{said}."
