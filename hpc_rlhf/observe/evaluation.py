"""What an evaluation found, read from its report and shown as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.observe.format import number
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import EVALUATION

if TYPE_CHECKING:
    from rich.console import RenderableType

# What a model's numbers are called; {base} is the model that the others are held against.
_ROWS = {
    "perplexity": "perplexity",
    "reward": "reward",
    "reward_gain": "gain over {base}",
    "win_rate": "wins against {base}",
    "pair_accuracy": "right pairs",
    "kl": "KL from {base}",
    "answer_tokens": "tokens",
    "ended": "ended",
    "distinct": "distinct",
    "bleu": "BLEU",
}
_SHARES = ("win_rate", "pair_accuracy", "ended", "distinct")


def read_report(run: RunDir) -> dict[str, Any]:
    """The report of a run's evaluation.

    Raises:
        HpcRlhfError: there is none that can be read.
    """
    path = run.stage(EVALUATION.name).report
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise HpcRlhfError(
            f"cannot read the evaluation: {reason}",
            where=str(path),
            hint=f"evaluate: hpc-rlhf eval {run.path}",
            exit_code=RUN_FAILED,
        ) from error
    return report


def table_rows(report: dict[str, Any], names: Mapping[str, str] | None = None) -> list[tuple[str, ...]]:
    """A row for each number that any model has, the models side by side; the first row is the header.

    Args:
        names: what models are called; by their names in the report where it does not say.
    """
    names = names or {}
    models = report["models"]
    rows: list[tuple[str, ...]] = [("", *(names.get(model, model) for model in models))] if models else []
    base = "the start" if report["base"] == "start" else names.get(report["base"], report["base"])
    for key, words in _ROWS.items():
        cells = [cell(key, one.get(key)) for one in models.values()]
        if any(cell != "-" for cell in cells):
            rows.append((words.format(base=base), *cells))
    return rows


def evaluation_parts(report: dict[str, Any]) -> Iterator[RenderableType]:
    """The table of an evaluation and the notes below it."""
    from rich.text import Text

    from hpc_rlhf.observe.terminal.tables import grid

    header, *rows = table_rows(report) or [()]
    if rows:
        table = grid(*header, right=header[1:])
        for row in rows:
            table.add_row(*row)
        for column in table.columns[1:]:
            column.no_wrap = True
        yield table
    for note in notes(report):
        yield Text(f"\n{note}")


def notes(report: dict[str, Any]) -> list[str]:
    """What stands below the table."""
    said = []
    right = report["reward_accuracy"]
    if right is not None:
        pairs = f"{right['pairs']} held-out pairs"
        said.append(f"The reward model prefers the chosen answer in {cell('win_rate', right)} of {pairs}.")
    if report["prompts"]:
        temperature, top_p, top_k = (report["sampling"][key] for key in ("temperature", "top_p", "top_k"))
        how = "the likeliest tokens" if not temperature else f"sampled at temperature {temperature:g}"
        how += f", top_p {top_p:g}" if temperature and top_p < 1 else ""
        how += f", top_k {top_k}" if temperature and top_k else ""
        said.append(
            f"Answers to {report['prompts']} held-out prompts, the same for all: {how}. "
            f"Intervals hold {report['confidence']:.0%} of the time."
        )
    return said


def cell(key: str, value: Any) -> str:
    """A number with its interval: as plus or minus for a mean, from and to for a share."""
    if isinstance(value, dict):
        low, high = value["low"], value["high"]
        if key in _SHARES:
            return f"{value['value']:.0%} ({100 * low:.0f}–{100 * high:.0f})"
        if high is None:
            return number(value["value"])
        half = high - value["value"]
        return (
            f"{number(value['value'])} ± {half:.2g}"
            if half < 10
            else f"{number(value['value'])} ± {half:,.0f}"
        )
    if value is not None and key in _SHARES:
        return f"{value:.0%}"
    return number(value)
