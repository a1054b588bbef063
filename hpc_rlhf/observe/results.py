"""The results of a run: those of its finished stages, their samples, and the report of its evaluation."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, NotRequired, TypedDict

from hpc_rlhf.observe.gather import unreadable
from hpc_rlhf.observe.metrics import json_lines, read_text
from hpc_rlhf.run import manifest
from hpc_rlhf.run.format import number
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import EVALUATION, STAGE_NAMES, kind_of

# The metrics of a model in the order shown, after its accuracy; {base} is the model that the others are compared with.
_ROWS = {
    "perplexity": "perplexity",
    "reward": "reward",
    "reward_gain": "gain over {base}",
    "win_rate": "wins against {base}",
    "pair_accuracy": "pair accuracy",
    "kl": "KL from {base}",
    "answer_tokens": "tokens",
    "ended": "ended",
    "distinct": "distinct",
    "bleu": "BLEU",
}
_SHARES = ("win_rate", "pair_accuracy", "ended", "distinct", "accuracy")
# Metrics whose names end with a number of responses.
AT_K = ("pass@", "majority@")


@dataclass(frozen=True)
class StageResult:
    """The result of a finished stage, as its manifest has it."""

    step: int | None
    seconds: float | None
    metrics: Mapping[str, Any]


def stage_results(run: RunDir) -> dict[str, StageResult]:
    """The results of the stages that have a manifest, by stage."""
    manifests = {stage: manifest.read(run.stage(stage).model) for stage in STAGE_NAMES}
    return {
        stage: StageResult(facts.get("step"), facts.get("seconds"), facts.get("metrics", {}))
        for stage, facts in manifests.items()
        if facts is not None
    }


def final_samples(run: RunDir, stage: str) -> list[dict[str, Any]]:
    """A stage's responses to held-out prompts at its end, one row per prompt.

    A row has ``prompt``, ``answer`` and maybe ``reward``; those of the model that the stage started from have the
    prefix ``sft_``.
    """
    rows = json_lines(read_text(run.stage(stage).samples))
    return list({row["prompt"]: row for row in rows if row.get("kind") == "final"}.values())


def describe_result(stage: str, metrics: Mapping[str, Any]) -> str:
    """The result of a stage in words."""
    if metrics.get("accuracies"):
        return "right: " + ", ".join(f"{name} {rate:.0%}" for name, rate in metrics["accuracies"].items())
    if metrics.get("win_rates"):
        rates = metrics["win_rates"].items()
        return ", ".join(f"{name} wins {rate:.0%} against {metrics['base']}" for name, rate in rates)
    words = _Numbers().vformat(kind_of(stage).result, (), defaultdict(lambda: None, metrics))
    if not metrics.get("best_step"):
        return words
    reward = metrics.get("held_out_reward")  # PPO's other numbers are those of its last steps
    best = f", held-out reward {number(reward)}, KL {number(metrics.get('held_out_kl'))}" if reward is not None else ""
    return f"{words}, best at step {metrics['best_step']}{best}"


class _Numbers(Formatter):
    """Formats metrics with three significant digits, and missing ones as a dash."""

    def format_field(self, value: float | None, format_spec: str) -> str:
        return format(value, format_spec) if format_spec and value is not None else number(value)


class Interval(TypedDict):
    """A number with its confidence interval, whose bounds may be unknown."""

    value: float
    low: float | None
    high: float | None


class PairAccuracy(Interval):
    """The accuracy of the reward model on a number of held-out pairs."""

    pairs: int


class Report(TypedDict):
    """report.json of an evaluation: its settings, and the metrics of each model, by model and name."""

    base: str
    prompts: int
    confidence: float
    sampling: dict[str, float]
    reward_accuracy: PairAccuracy | None
    samples: NotRequired[int]
    judged_by: NotRequired[list[str]]
    models: dict[str, dict[str, Any]]


def read_report(run: RunDir) -> Report:
    """The report of a run's evaluation.

    Raises:
        HpcRlhfError: there is no readable report.
    """
    path = run.stage(EVALUATION.name).report
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable("the evaluation", path, error, f"to evaluate the run: hpc-rlhf eval {run.path}") from error
    return report


def table_rows(report: Report, titles: Mapping[str, str] | None = None) -> list[tuple[str, ...]]:
    """A header, and a row for each metric that any model has, with the models side by side.

    Args:
        titles: how to call models; by default by their names in the report.
    """
    titles = titles or {}
    models = report["models"]
    rows: list[tuple[str, ...]] = [("", *(titles.get(model, model) for model in models))] if models else []
    base = "the start" if report["base"] == "start" else titles.get(report["base"], report["base"])
    for title, key, values in _metrics(list(models.values())):
        cells = [cell(key, value) for value in values]
        if any(text != "-" for text in cells):
            rows.append((title.format(base=base), *cells))
    return rows


def _metrics(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, list[Any]]]:
    """The title of each metric, its name, and its value of each model."""

    def metric(title: str, name: str) -> tuple[str, str, list[Any]]:
        return title, name, [metrics.get(name) for metrics in models]

    yield metric("accuracy", "accuracy")
    by_source = [metrics.get("sources", {}) for metrics in models]
    for source in dict.fromkeys(source for sources in by_source for source in sources):
        title = f"accuracy: {source}".replace("{", "{{").replace("}", "}}")
        yield title, "accuracy", [sources.get(source, {}).get("accuracy") for sources in by_source]
    yield metric("accuracy gain over {base}", "accuracy_gain")
    names = dict.fromkeys(name for metrics in models for name in metrics)
    for start in (*AT_K, "reward/"):
        yield from (metric(name, name) for name in names if name.startswith(start))
    yield from (metric(title, name) for name, title in _ROWS.items())


def notes(report: Report) -> list[str]:
    """The sentences below the table."""
    sentences = []
    accuracy = report["reward_accuracy"]
    if accuracy is not None:
        share = cell("win_rate", accuracy)
        sentences.append(
            f"The reward model prefers the chosen response in {share} of {accuracy['pairs']} held-out pairs."
        )
    if report["prompts"]:
        temperature, top_p, top_k = (report["sampling"][key] for key in ("temperature", "top_p", "top_k"))
        how = f"sampled at temperature {temperature:g}" if temperature else "greedy decoding"
        how += f", top_p {top_p:g}" if temperature and top_p < 1 else ""
        how += f", top_k {top_k}" if temperature and top_k else ""
        if report.get("judged_by"):
            samples = report.get("samples", 1)
            each = f"{samples} responses" if samples > 1 else "a response"
            sentences.append(f"Accuracy by {' and '.join(report['judged_by'])}, of {each} to each prompt.")
        sentences.append(
            f"Responses to the same {report['prompts']} held-out prompts, {how}. "
            f"With {report['confidence']:.0%} confidence intervals."
        )
    return sentences


def _is_share(key: str) -> bool:
    return key in _SHARES or key.startswith(AT_K)


def cell(key: str, value: float | Interval | None) -> str:
    """A metric with its interval: plus or minus for a mean, from and to for a share."""
    if not isinstance(value, dict):
        return f"{value:.0%}" if value is not None and _is_share(key) else number(value)
    mean, low, high = value["value"], value["low"], value["high"]
    if low is None or high is None:
        return f"{mean:.0%}" if _is_share(key) else number(mean)
    if _is_share(key):
        return f"{mean:.0%} ({100 * low:.0f}–{100 * high:.0f})"
    half = high - mean
    return f"{number(mean)} ± {half:,.0f}" if half >= 10 else f"{number(mean)} ± {half:.2g}"
