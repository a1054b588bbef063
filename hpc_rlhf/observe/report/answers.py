"""The same prompts, answered by the models of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hpc_rlhf.observe.format import number
from hpc_rlhf.observe.summary import final_samples
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.stages import BASE, EVALUATION, POLICIES, STAGE_NAMES

# In the order in which they stand side by side.
MODELS = {
    "start": "before training",
    **{
        name: kind.title if name == kind.name else f"{name.upper()} of {kind.title}"
        for name, kind in POLICIES.items()
    },
    "reference": "the data's own answer",
}
SHOWN = 24
_LONGEST = 2_000  # characters of a prompt or an answer


@dataclass(frozen=True)
class Answer:
    """A model's answer, and what the reward model gives for it; empty where it was not asked."""

    model: str
    text: str
    reward: str


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answers."""

    prompt: str
    answers: list[Answer]


def read_exchanges(run: RunDir) -> list[Exchange]:
    """What the evaluation compared; before there is one, what PPO and DPO answered at their end."""
    rows = list(_evaluated(run)) or list(_final(run))
    return [
        Exchange(
            _cut(_asked(prompt)),
            [
                Answer(words, _cut(answers[name]), number(rewards[name]) if name in rewards else "")
                for name, words in MODELS.items()
                if name in answers
            ],
        )
        for prompt, answers, rewards in rows[:SHOWN]
    ]


_Row = tuple[str, dict[str, str], dict[str, float]]


def _evaluated(run: RunDir) -> Iterator[_Row]:
    try:
        lines = run.stage(EVALUATION.name).answers.read_text(encoding="utf-8").split("\n")
    except OSError:
        return
    for line in lines:
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        yield row["prompt"], row["answers"], row["rewards"]


def _final(run: RunDir) -> Iterator[_Row]:
    for stage in STAGE_NAMES:
        for row in final_samples(run, stage):
            said = {BASE.name: row.get("sft_answer"), stage: row.get("answer")}
            rewards = {BASE.name: row.get("sft_reward"), stage: row.get("reward")}
            answers = {name: text.strip() for name, text in said.items() if text is not None}
            yield (
                row["prompt"],
                answers,
                {name: value for name, value in rewards.items() if value is not None},
            )


def _asked(prompt: str) -> str:
    """A prompt as people read it: without the call to answer, and of a single question without the speaker's name."""
    said = prompt.strip().removesuffix("Assistant:").strip()
    return said.removeprefix("Human:").strip() if said.count("Human:") == 1 else said


def _cut(text: str) -> str:
    return (
        text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"
    )
