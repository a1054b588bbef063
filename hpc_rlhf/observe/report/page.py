"""Render the report and write the file."""

from __future__ import annotations

import base64
import hashlib
import sys
import time
from pathlib import Path

from hpc_rlhf import __version__
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.observe.gather import RunPlan
from hpc_rlhf.observe.goodput.spans import count_words, split_words, total
from hpc_rlhf.observe.metrics import read_text
from hpc_rlhf.observe.report import outcome, timeline
from hpc_rlhf.observe.report.charts import MAX_POINTS, make_charts
from hpc_rlhf.observe.report.responses import MODELS, read_exchanges
from hpc_rlhf.observe.results import Report, notes, read_report, stage_results, table_rows
from hpc_rlhf.observe.status import read_status
from hpc_rlhf.run.events import Started
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger

_HERE = Path(__file__).parent


def write_report(run: RunDir, out: Path | None = None) -> Path:
    """Write the report of a run as it is now, atomically, and return its path.

    Args:
        out: the file to write; by default the run's own.

    Raises:
        HpcRlhfError: the run's plan cannot be read.
        OSError: the file cannot be written.
    """
    path = out or run.report
    text = make_page(run)
    write_atomically(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


def leave_report(run: RunDir) -> None:
    """Write the report of a run that has stopped. An error there is only a line on stderr."""
    try:
        write_report(run)
    except Exception as error:  # it must not hide the reason why the run stopped
        print(f"hpc-rlhf: the report was not written: {error}", file=sys.stderr, flush=True)


def make_page(run: RunDir) -> str:
    """The report as HTML. Text from users and models is escaped, and only our own scripts can run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    scripts = [_read("uplot/uPlot.iife.min.js"), _read("page.js")]
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        **_content(run),
        styles=[_read("uplot/uPlot.min.css"), _read("page.css")],
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
    )


def _content(run: RunDir) -> dict[str, object]:
    plan, events = RunPlan.read(run), list(Ledger(run.ledger).events())
    statuses = read_status(run)
    results, report = stage_results(run), _evaluation(run)
    goodput = {status.stage: status.goodput for status in statuses}
    whole = total(goodput)
    started = [event for event in events if isinstance(event, Started)]
    charts = {}
    for planned in plan.stages:
        starts = [event.time for event in started if event.stage == planned.stage]
        metrics = read_text(run.stage(planned.stage).metrics)
        charts[planned.stage] = make_charts(metrics, planned.stage, planned.global_batch, starts)
    return {
        "name": plan.name,
        "folder": str(run.path),
        "state": outcome.run_state(statuses),
        "sentence": outcome.sentence(statuses, results, report),
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
        "chart_data": [chart.to_dict() for of_stage in charts.values() for chart in of_stage],
        "most": MAX_POINTS,
        "table": [] if report is None else table_rows(report, MODELS),
        "notes": [] if report is None else notes(report),
        "exchanges": read_exchanges(run),
        "versions": _versions(started),
        "spec": run.job_yaml.read_text(encoding="utf-8", errors="replace"),
        "written": timeline.moment(time.time()),
        "writer": __version__,
    }


def _evaluation(run: RunDir) -> Report | None:
    try:
        return read_report(run)
    except HpcRlhfError:
        return None


def _versions(started: list[Started]) -> list[tuple[str, str]]:
    """The versions that attempts ran with, the latest last."""
    seen: dict[str, dict[str, None]] = {}
    for event in started:
        for name, version in event.versions.items():
            seen.setdefault(name, {})[str(version)] = None
    return [(name, ", then ".join(versions)) for name, versions in seen.items()]


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The hash by which the Content-Security-Policy allows a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
