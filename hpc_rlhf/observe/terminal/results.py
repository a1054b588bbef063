"""The results of a finished run on the terminal: stages, evaluation, sample responses and the next commands."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hpc_rlhf.observe import results
from hpc_rlhf.observe.terminal.tables import grid
from hpc_rlhf.run.format import duration, number
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import BASE, EVALUATION, STAGE_KINDS, kind_of

_MAX_SAMPLES = 3
_MAX_CHARACTERS = 400  # of a prompt or response
_MAX_WIDTH = 160  # columns of the table of responses, which has no natural width


def summary(run: RunDir, width: int) -> Iterator[RenderableType]:
    """The results of a run, for a console of some width."""
    table = grid("stage", "steps", "time", "result", right=("steps", "time"))
    table.columns[2].no_wrap = True
    finished = results.stage_results(run)
    for stage, result in finished.items():
        took = "-" if result.seconds is None else duration(result.seconds)
        steps = "-" if result.step is None else str(result.step)
        table.add_row(stage, steps, took, results.describe_result(stage, result.metrics))
    yield table
    if EVALUATION.name in finished:
        yield Text()
        yield from evaluation(results.read_report(run))
    for kind in STAGE_KINDS:
        yield from _responses(results.final_samples(run, kind.name)[:_MAX_SAMPLES], kind.title, width)
    policies = [stage for stage in finished if kind_of(stage).makes_policy]
    if policies:
        yield from _next(run, policies[-1])


def evaluation(report: results.Report) -> Iterator[RenderableType]:
    """The table of an evaluation and the notes below it."""
    header, *rows = results.table_rows(report) or [()]
    if rows:
        table = grid(*header, right=header[1:])
        for row in rows:
            table.add_row(*row)
        for column in table.columns[1:]:
            column.no_wrap = True
        yield table
        yield Text()
    for note in results.notes(report):
        yield Text(note)


def _responses(samples: Sequence[dict[str, Any]], title: str, width: int) -> Iterator[RenderableType]:
    """Responses to held-out prompts, before and after a stage."""
    if not samples:
        return
    table = grid("held-out prompt", f"after {BASE.title}", f"after {title}")
    table.width, table.padding = min(width, _MAX_WIDTH), (0, 2, 1, 0)
    for column, ratio in zip(table.columns, (3, 4, 4), strict=True):
        column.ratio = ratio
    for sample in samples:
        before = _response(sample.get("sft_answer"), sample.get("sft_reward"))
        after = _response(sample.get("answer"), sample.get("reward"))
        question = sample["prompt"].rpartition("Human:")[2].partition("\n\nAssistant:")[0]
        table.add_row(Text(_shortened(question)), before, after)
    yield Text()
    yield table


def _response(text: str | None, reward: float | None) -> Text:
    """A response, and below it its reward, if it has one."""
    response = Text(_shortened(text or "-"))
    if reward is not None:
        response.append(f"\nreward {number(reward)}", style="dim")
    return response


def _next(run: RunDir, stage: str) -> Iterator[RenderableType]:
    """The next commands, and the files that the run made."""
    folder = _short_path(run.path)
    rows = {
        "chat with the model": f"hpc-rlhf chat {folder}",
        "see the status": f"hpc-rlhf status {folder}",
        "see the curves": f"tensorboard --logdir {_short_path(run.path / 'stages')}",
        "model": _short_path(run.stage(stage).model),
        **({"report": _short_path(run.report)} if run.report.exists() else {}),
    }
    yield Text("Next:")
    for what, command in rows.items():
        yield Text(f"  {what}: {command}", no_wrap=True)


def _shortened(text: str) -> str:
    """Text on one line, without the control characters by which a model could drive the terminal."""
    flat = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return flat if len(flat) <= _MAX_CHARACTERS else flat[: _MAX_CHARACTERS - 1] + "…"


def _short_path(path: Path) -> str:
    """The shortest way to write a path here, quoted for a shell."""
    return shlex.quote(min(str(path), os.path.relpath(path), key=len))
