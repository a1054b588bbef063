"""The accuracy of the models' responses, by rewards that can be verified: pass@1, pass@k and majority@k."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_rlhf import intervals
from hpc_rlhf.intervals import Interval
from hpc_rlhf.spec.rewards import RewardItem, names
from hpc_rlhf.train.algorithms.accuracy import majority_at_k, pass_at_k
from hpc_rlhf.train.rewards.blend import Scores
from hpc_rlhf.train.rewards.build import pattern

# The kinds of rewards that judge an answer, and those of them whose answer is text that can be compared.
ANSWERS, COMPARABLE = ("math", "exact", "code", "reasoning_gym"), ("math", "exact")
# What distinguishes wrong answers without a format: the last formula in a box, or the last number.
_BOX, _NUMBER = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"), re.compile(r"-?\d[\d.,]*")


@dataclass
class Verdicts:
    """What the rewards say about a model's responses: all of the first prompt, then all of the second, and so on.

    Attributes:
        scores: of each reward, by its name; None where it does not apply or failed.
        right: whether each response is right; None where no reward judges it, or one failed.
        answers: what wrong responses answer; None where they have no answer. Empty if the rewards compare no answers.
    """

    scores: dict[str, list[float | None]] = field(default_factory=dict)
    right: list[bool | None] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)


def judging(rewards: Sequence[RewardItem]) -> dict[str, RewardItem]:
    """The rewards that decide whether a response is right, by name: those that judge its answer, or if there are none
    all that can be verified."""
    verifiable = {name: item for name, item in zip(names(rewards), rewards, strict=True) if item.kind != "model"}
    return {name: item for name, item in verifiable.items() if item.kind in ANSWERS} or verifiable


def verdicts(rewards: Sequence[RewardItem], scores: Scores, texts: Sequence[str]) -> Verdicts:
    """A response is right if all rewards that decide, and apply to it, give at least 1.

    Args:
        texts: the responses.
    """
    deciding = judging(rewards)
    right: list[bool | None] = []
    for row, failed in enumerate(scores.failed):
        own = [score for name in deciding if (score := scores.parts[name][row]) is not None]
        right.append(min(own) >= 1 if own and not failed else None)
    answers: list[str | None] = []
    if all(item.kind in COMPARABLE for item in deciding.values()):
        for row, text in enumerate(texts):
            applying = (item for name, item in deciding.items() if scores.parts[name][row] is not None)
            answers.append(next((_answer(item, text) for item in applying), None))
    return Verdicts(scores.parts, right, answers)


def _answer(item: RewardItem, response: str) -> str | None:
    selects = pattern(item)
    if selects is not None:
        text = selects.selected(response)
    elif item.exact is not None:
        text = response
    else:
        text = next((last[-1] for form in (_BOX, _NUMBER) if (last := form.findall(response))), None)
    return None if text is None else text.strip()


@dataclass(frozen=True)
class _Group:
    """The responses to a prompt that were judged: their answers, and whether they are right.

    Attributes:
        answers: all right ones have the same, however they write it. Empty if no answers are compared.
    """

    right: list[bool]
    answers: list[str | bool | None]

    @property
    def rate(self) -> float:
        return sum(self.right) / len(self.right)


def _groups(verdicts: Verdicts, samples: int) -> list[_Group | None]:
    """The responses to each prompt; None where none was judged."""
    groups: list[_Group | None] = []
    for first in range(0, len(verdicts.right), samples):
        judged = {row: good for row in range(first, first + samples) if (good := verdicts.right[row]) is not None}
        answers: list[str | bool | None] = []
        if verdicts.answers:
            answers = [good or verdicts.answers[row] for row, good in judged.items()]
        groups.append(_Group(list(judged.values()), answers) if judged else None)
    return groups


def accuracy_metrics(verdicts: Verdicts, samples: int) -> dict[str, Interval]:
    """accuracy (pass@1), pass@k and majority@k of a model for powers of two up to ``samples``, over the prompts.

    The intervals are Wilson's with a prompt as a trial. They are a little too wide if there are several responses to a
    prompt, whose mean varies less than a single one. Prompts with fewer than k judged responses are left out.
    """
    groups = [group for group in _groups(verdicts, samples) if group is not None]
    metrics: dict[str, Interval] = {}
    if groups:
        metrics["accuracy"] = intervals.share(sum(group.rate for group in groups), len(groups))
    k = 2
    while large := [group for group in groups if len(group.right) >= k]:
        passed = sum(pass_at_k(len(group.right), sum(group.right), k) for group in large)
        metrics[f"pass@{k}"] = intervals.share(passed, len(large))
        if verdicts.answers:
            voted = sum(majority_at_k(group.answers, group.right, k) for group in large)
            metrics[f"majority@{k}"] = intervals.share(voted, len(large))
        k *= 2
    return metrics


def gain(verdicts: Verdicts, base: Verdicts, samples: int) -> Interval | None:
    """How much higher the accuracy is than another model's, on the same prompts; None if none is judged for both."""
    pairs = zip(_groups(verdicts, samples), _groups(base, samples), strict=True)
    gains = [ours.rate - theirs.rate for ours, theirs in pairs if ours is not None and theirs is not None]
    return intervals.mean(gains) if gains else None


def reward_means(verdicts: Verdicts, samples: int) -> dict[str, Interval]:
    """The mean of each reward, as ``reward/NAME``: over prompts, of the mean of their responses."""
    means: dict[str, Interval] = {}
    for name, scores in verdicts.scores.items():
        groups = [[s for s in scores[at : at + samples] if s is not None] for at in range(0, len(scores), samples)]
        if by_prompt := [sum(group) / len(group) for group in groups if group]:
            means[f"reward/{name}"] = intervals.mean(by_prompt)
    return means


def of_source(verdicts: Verdicts, samples: int, sources: Sequence[str], source: str) -> Verdicts:
    """The verdicts on the responses to the prompts of one source.

    Args:
        sources: the source of each prompt.
    """
    rows = [row for row in range(len(verdicts.right)) if sources[row // samples] == source]

    def take(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows] if values else []

    scores: Mapping[str, list[float | None]] = {name: take(one) for name, one in verdicts.scores.items()}
    return Verdicts(dict(scores), take(verdicts.right), take(verdicts.answers))
