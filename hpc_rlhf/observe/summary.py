"""What a finished run came to: a table of its stages, a few answers side by side, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from hpc_rlhf.observe.evaluation import evaluation_parts, read_report
from hpc_rlhf.observe.format import duration, number
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import BASE, EVALUATION, STAGE_KINDS, STAGE_NAMES, kind_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_QUESTIONS = 3
_LONGEST = 400  # characters of an answer that are shown
_MAX_WIDTH = 160  # columns of the table of responses


def stage_facts(run: RunDir) -> dict[str, dict[str, Any]]:
    """The manifests of the stages that have one, by stage."""
    found = {stage: manifest.read(run.stage(stage).model) for stage in STAGE_NAMES}
    return {stage: facts for stage, facts in found.items() if facts is not None}


def final_samples(run: RunDir, stage: str) -> list[dict[str, Any]]:
    """A stage's answers to held-out prompts at its end, each with the SFT model's; one for every prompt."""
    try:
        lines = run.stage(stage).samples.read_text(encoding="utf-8").split("\n")
    except OSError:
        return []
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == "final":
            rows[row["prompt"]] = row
    return list(rows.values())


def outcome(stage: str, metrics: dict[str, Any]) -> str:
    """What a stage achieved, in words."""
    if metrics.get("win_rates"):
        rates = metrics["win_rates"].items()
        return ", ".join(f"{name} wins {rate:.0%} against {metrics['base']}" for name, rate in rates)
    return _Numbers().vformat(kind_of(stage).result, (), defaultdict(lambda: None, metrics))


class _Numbers(Formatter):
    """Writes a metric as a number with three significant digits, and a dash for one that is missing."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return format(value, format_spec) if format_spec and value is not None else number(value)


def summary(run: RunDir, width: int) -> Iterator[RenderableType]:
    """The results of a finished run: its stages, its evaluation, sample responses and the next commands."""
    from rich.text import Text

    from hpc_rlhf.observe.terminal.tables import grid

    table = grid("stage", "steps", "time", "result", right=("steps", "time"))
    table.columns[2].no_wrap = True
    facts = stage_facts(run)
    for stage, fact in facts.items():
        seconds = fact.get("seconds")
        took = "-" if seconds is None else duration(seconds)
        table.add_row(stage, str(fact.get("step", "-")), took, outcome(stage, fact.get("metrics", {})))
    yield table
    if EVALUATION.name in facts:
        yield Text()
        yield from evaluation_parts(read_report(run))
    for kind in STAGE_KINDS:
        yield from _answers(final_samples(run, kind.name)[:_QUESTIONS], kind.title, width)
    last = [stage for stage in facts if kind_of(stage).makes_policy]
    if last:
        yield from _next(run, last[-1])


def _answers(samples: list[dict[str, Any]], title: str, width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    from hpc_rlhf.observe.terminal.tables import grid

    if not samples:
        return
    table = grid("held-out prompt", f"after {BASE.title}", f"after {title}")
    table.width, table.padding, table.collapse_padding = min(width, _MAX_WIDTH), (0, 2, 1, 0), False
    for column, ratio in zip(table.columns, (3, 4, 4), strict=True):
        column.ratio = ratio
    for sample in samples:
        table.add_row(Text(question(sample["prompt"])), _judged(sample, "sft_"), _judged(sample, ""))
    yield Text()
    yield table


def _judged(sample: dict[str, Any], whose: str) -> Text:
    """An answer, and below it what the reward model gives for it, where there is one."""
    from rich.text import Text

    answer = Text(_shortened(sample.get(f"{whose}answer") or "-"))
    if f"{whose}reward" in sample:
        answer.append(f"\nreward {number(sample[f'{whose}reward'])}", style="dim")
    return answer


def question(prompt: str) -> str:
    """The last thing that the person says in a prompt."""
    return _shortened(prompt.rpartition("Human:")[2].partition("\n\nAssistant:")[0])


def _next(run: RunDir, stage: str) -> Iterator[RenderableType]:
    """The next commands and the files that the run made."""
    from rich.text import Text

    folder = _short_path(run.path)
    rows = {
        "chat with the model": f"hpc-rlhf chat {folder}",
        "see the progress": f"hpc-rlhf status {folder}",
        "see the curves": f"tensorboard --logdir {_short_path(run.path / 'stages')}",
        "model": _short_path(run.stage(stage).model),
        **({"report": _short_path(run.report)} if run.report.exists() else {}),
    }
    yield Text("\nNext:")
    for what, command in rows.items():
        yield Text(f"  {what}: {command}", no_wrap=True)


def _shortened(text: str) -> str:
    # Whatever a model says, a terminal is not to act on it.
    flat = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"


def _short_path(path: Path) -> str:
    """As one would type it: relative where that is shorter, and quoted where the shell needs it."""
    relative = os.path.relpath(path)
    return shlex.quote(min(str(path), relative, key=len))
