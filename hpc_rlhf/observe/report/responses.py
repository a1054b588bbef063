"""The responses of a run's models to the same prompts."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_rlhf.observe.metrics import json_lines, read_text
from hpc_rlhf.observe.results import final_samples
from hpc_rlhf.run.format import number
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import BASE, EVALUATION, POLICIES, STAGE_NAMES

# Titles of the models, in the order shown.
MODELS = {
    "start": "before training",
    **{name: kind.title if name == kind.name else f"{name.upper()} of {kind.title}" for name, kind in POLICIES.items()},
    "reference": "the data's own response",
}
MAX_EXCHANGES = 24
_MAX_CHARACTERS = 2_000  # of a prompt or response


def read_exchanges(run: RunDir) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Prompts and the responses to them: those of the evaluation, else those at the end of the last stages.

    A response is (title of the model, text, reward); the reward is empty if there is none.
    """
    evaluated = json_lines(read_text(run.stage(EVALUATION.name).answers))
    rows = [(row["prompt"], row["answers"], row["rewards"]) for row in evaluated] or list(_final(run))
    exchanges = []
    for prompt, texts, rewards in rows[:MAX_EXCHANGES]:
        responses = [
            (title, _cut(texts[name]), number(rewards[name]) if name in rewards else "")
            for name, title in MODELS.items()
            if name in texts
        ]
        exchanges.append((_cut(_displayed(prompt)), responses))
    return exchanges


def _final(run: RunDir) -> Iterator[tuple[str, dict[str, str], dict[str, float]]]:
    for stage in STAGE_NAMES:
        for row in final_samples(run, stage):
            texts = {BASE.name: row.get("sft_answer"), stage: row.get("answer")}
            rewards = {BASE.name: row.get("sft_reward"), stage: row.get("reward")}
            yield (
                row["prompt"],
                {name: text.strip() for name, text in texts.items() if text is not None},
                {name: value for name, value in rewards.items() if value is not None},
            )


def _displayed(prompt: str) -> str:
    """A prompt without its trailing `Assistant:`, and if it has one turn, without its `Human:`."""
    text = prompt.strip().removesuffix("Assistant:").strip()
    return text.removeprefix("Human:").strip() if text.count("Human:") == 1 else text


def _cut(text: str) -> str:
    hidden = len(text) - _MAX_CHARACTERS
    return text if hidden <= 0 else f"{text[:_MAX_CHARACTERS]} … ({hidden:,} more characters)"
