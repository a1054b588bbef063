"""The outcome of a run in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpc_rlhf.observe.format import duration
from hpc_rlhf.observe.report.responses import MODELS
from hpc_rlhf.observe.results import Report, StageResult, cell, describe_result
from hpc_rlhf.observe.status import StageStatus
from hpc_rlhf.spec.stages import BASE, POLICIES, kind_of

# States of a stage that will go on without the user.
_ACTIVE = frozenset({
    "running", "pending", "waiting", "requeued", "starting", "completing", "configuring", "not started",
    "stopping",
})  # fmt: skip
_PHRASES = {
    "failed": "has failed",
    "not started": "has not started",
    "cancelled": "was cancelled",
    "interrupted": "was interrupted",
    "refused": "was refused by Slurm",
    "unknown": "is in an unknown state",
}


def run_state(statuses: Sequence[StageStatus]) -> str:
    """The state of a run: finished, running, queued, not started or stopped."""
    states = {status.state for status in statuses}
    if states == {"done"}:
        return "finished"
    if states <= {"not started"}:
        return "not started"
    if states & {"running", "completing", "stopping"}:
        return "running"
    return "queued" if states - {"done"} <= _ACTIVE and states - {"done", "not started"} else "stopped"


def sentence(statuses: Sequence[StageStatus], results: Mapping[str, StageResult], report: Report | None) -> str:
    """What the run achieved; for an unfinished run, how far it is.

    Args:
        results: of the finished stages.
        report: of the evaluation, if there is one.
    """
    unfinished = [status for status in statuses if status.state != "done"]
    if unfinished:
        current = next((status for status in unfinished if status.state != "not started"), unfinished[0])
        return _standing(current, len(statuses) - len(unfinished), len(statuses))
    for name in (model for model in POLICIES if model != BASE.name):
        rate = report["models"].get(name, {}).get("win_rate") if report else None
        if report and isinstance(rate, dict):
            base = MODELS.get(report["base"], report["base"])
            rival = "the model before training" if report["base"] == "start" else base
            return (
                f"{MODELS[name]} wins against {rival} on {cell('win_rate', rate)} of {report['prompts']} "
                "held-out prompts, as judged by the run’s own reward model."
            )
    trained = [stage for stage in results if kind_of(stage).trains]
    last = trained[-1:] or list(results)[-1:]
    return " ".join(
        f"{kind_of(stage).title} is done: {describe_result(stage, results[stage].metrics)}." for stage in last
    )


def _standing(status: StageStatus, done: int, stages: int) -> str:
    phrase = _PHRASES.get(status.state, f"is {status.state}")
    text = f"{done} of {stages} stages done; {status.stage} {phrase}"
    if status.step is not None:
        text += f" at step {status.step:,} of {status.total_steps:,}"
    if status.left:
        text += f", with {duration(status.left)} of work left"
    return f"{text}: {status.why}." if status.why else f"{text}."
