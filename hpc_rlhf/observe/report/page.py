"""Write the report: what it says of a run as a whole, and the page with all its parts."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe import results
from hpc_rlhf.observe.gather import RunPlan
from hpc_rlhf.observe.goodput.spans import count_words, split_words, total
from hpc_rlhf.observe.metrics import read_text
from hpc_rlhf.observe.report import timeline
from hpc_rlhf.observe.report.charts import MAX_POINTS, make_charts
from hpc_rlhf.observe.report.rendering import render
from hpc_rlhf.observe.report.responses import MODELS, read_exchanges
from hpc_rlhf.observe.rounds import read_rounds
from hpc_rlhf.observe.status import StageStatus, read_status
from hpc_rlhf.run.events import Started
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.format import duration
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.masking import mask, mask_all
from hpc_rlhf.run.row_counts import Outcome
from hpc_rlhf.spec.load import read_spec
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


def write_report(run: RunDir) -> Path:
    """Write the report of a run as it is now, atomically, and return its path.

    Raises:
        HpcRlhfError: the run's plan cannot be read.
        OSError: the file cannot be written.
    """
    write_atomically(run.report, make_page(run))
    return run.report


def leave_report(run: RunDir) -> None:
    """Write the report of a run that has stopped. An error there is only a line on stderr."""
    try:
        write_report(run)
    except Exception as error:  # it must not hide the reason why the run stopped
        print(f"hpc-rlhf: the report was not written: {error}", file=sys.stderr, flush=True)


def make_page(run: RunDir) -> str:
    """The report as HTML. Text from users and models is escaped, and only our own scripts can run."""
    return render("page.html.j2", **_content(run))


def _content(run: RunDir) -> dict[str, object]:
    plan, events = RunPlan.read(run), list(Ledger(run.ledger).events())
    statuses = read_status(run)
    state = _state(statuses)
    report = _evaluation(run)
    goodput = {status.stage: status.goodput for status in statuses}
    whole = total(goodput)
    started = [event for event in events if isinstance(event, Started)]
    charts = {}
    for planned in plan.stages:
        starts = [event.time for event in started if event.stage == planned.stage]
        metrics = read_text(run.stage(planned.stage).metrics)
        own = make_charts(metrics, planned.stage, planned.global_batch, starts)
        charts[planned.stage] = [chart.to_dict() for chart in own]
    return {
        "title": f"{plan.name}: {state}",
        "name": plan.name,
        "folder": str(run.path),
        "state": state,
        "sentence": _sentence(run, statuses, report),
        "interruptions": count_words(whole.interruptions),
        "split": split_words(whole.spans),
        "statuses": statuses,
        "timeline": timeline.make_timeline(
            goodput,
            {status.stage: "finished" if status.state == "done" else status.state for status in statuses},
            {event.attempt: event.host for event in started},
        ),
        "spans": timeline.TITLES,
        "width": timeline.WIDTH,
        "charts": {stage: of_stage for stage, of_stage in charts.items() if of_stage},
        "chart_data": [chart for of_stage in charts.values() for chart in of_stage],
        "most": MAX_POINTS,
        "data": [
            (status.stage, counts, outcome, counts.outcomes[outcome])
            for status in statuses
            for counts in status.data
            for outcome in Outcome
            if outcome in counts.outcomes
        ],
        "data_warnings": [
            f"{status.stage}: {text}" for status in statuses for counts in status.data for text in counts.warnings()
        ],
        "rounds": _rounds(run),
        "table": [] if report is None else results.table_rows(report, MODELS),
        "notes": [] if report is None else results.notes(report),
        "exchanges": read_exchanges(run),
        "versions": _versions(started),
        "spec": _spec(run),
        "written": timeline.moment(time.time()),
    }


def _spec(run: RunDir) -> str:
    """The resolved spec with secrets masked."""
    text = run.job_yaml.read_text(encoding="utf-8", errors="replace")
    try:
        return yaml.safe_dump(mask_all(yaml.safe_load(text)), sort_keys=False, allow_unicode=True, width=110)
    except yaml.YAMLError:  # it was damaged
        return mask(text)


def _state(statuses: Sequence[StageStatus]) -> str:
    """The state of a run: finished, running, queued, not started or stopped."""
    states = {status.state for status in statuses}
    if states == {"done"}:
        return "finished"
    if states <= {"not started"}:
        return "not started"
    if states & {"running", "completing", "stopping"}:
        return "running"
    return "queued" if states - {"done"} <= _ACTIVE and states - {"done", "not started"} else "stopped"


def _sentence(run: RunDir, statuses: Sequence[StageStatus], report: results.Report | None) -> str:
    """What the run achieved; for an unfinished run, how far it is."""
    unfinished = [status for status in statuses if status.state != "done"]
    if unfinished:
        current = next((status for status in unfinished if status.state != "not started"), unfinished[0])
        return _standing(current, len(statuses) - len(unfinished), len(statuses))
    for name in (model for model in POLICIES if model != BASE.name):
        accuracy = report["models"].get(name, {}).get("accuracy") if report else None
        if report and accuracy is not None:
            prompts = f"{report['prompts']} held-out prompts"
            return f"{MODELS[name]} is right on {results.cell('accuracy', accuracy)} of {prompts}."
        rate = report["models"].get(name, {}).get("win_rate") if report else None
        if report and rate is not None:
            base = MODELS.get(report["base"], report["base"])
            rival = "the model before training" if report["base"] == "start" else base
            return (
                f"{MODELS[name]} wins against {rival} on {results.cell('win_rate', rate)} of {report['prompts']} "
                "held-out prompts, as judged by the run’s own reward model."
            )
    done = results.stage_results(run)
    trained = [stage for stage in done if kind_of(stage).trains]
    last = trained[-1:] or list(done)[-1:]
    return " ".join(
        f"{kind_of(stage).title} is done: {results.describe_result(stage, done[stage].metrics)}." for stage in last
    )


def _standing(status: StageStatus, done: int, stages: int) -> str:
    phrase = _PHRASES.get(status.state, f"is {status.state}")
    text = f"{done} of {stages} stages done; {status.stage} {phrase}"
    if status.step is not None:
        text += f" at step {status.step:,} of {status.total_steps:,}"
    if status.left:
        text += f", with {duration(status.left)} of work left"
    return f"{text}: {status.why}." if status.why else f"{text}."


def _evaluation(run: RunDir) -> results.Report | None:
    try:
        return results.read_report(run)
    except HpcRlhfError:
        return None


def _rounds(run: RunDir) -> list[tuple[str, ...]]:
    """The rows of the rounds up to this run; none if it follows no other, or what it follows is gone."""
    try:
        spec = read_spec(run.job_yaml)
        rounds = list(read_rounds(spec)) if spec.follows else []
    except HpcRlhfError:
        return []
    return [
        (str(each.number), each.run, each.model, results.cell("win_rate", each.win_rate), each.against)
        for each in rounds
    ]


def _versions(started: list[Started]) -> list[tuple[str, str]]:
    """The versions that attempts ran with, the latest last."""
    seen: dict[str, dict[str, None]] = {}
    for event in started:
        for name, version in event.versions.items():
            seen.setdefault(name, {})[str(version)] = None
    return [(name, ", then ".join(versions)) for name, versions in seen.items()]
