"""From what was measured of each model to the numbers that are reported, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc_rlhf.spec.stages import EvalSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms import intervals
from hpc_rlhf.train.algorithms.intervals import Interval
from hpc_rlhf.train.algorithms.ppo import k3_kl
from hpc_rlhf.train.stages.eval.data import HeldOut


@dataclass
class Measured:
    """What was measured of one model on the held-out prompts; a list has an entry for each of them.

    Attributes:
        perplexity: of held-out answers, given their prompts; None where there are none.
        answers: the model's own, as token ids.
        log_probs: of each answer's tokens, by the model itself.
        base_log_probs: of the same tokens by the model that the others are held against; empty for that one itself.
        preferences: how much likelier, in nats, the model takes the chosen answer of each held-out pair to be than the
            rejected one; of DPO's model and of the one it is held against, otherwise empty.
        rewards: the reward model's scores; empty without one.
    """

    perplexity: float | None = None
    answers: list[list[int]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)
    base_log_probs: list[list[float]] = field(default_factory=list)
    preferences: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


@dataclass
class Found:
    """What an evaluation has found so far.

    Attributes:
        models: what was measured of each, the one that the others are held against last.
        references: the reward model's scores of the data's own answers to the prompts.
        chosen, rejected: its scores of the pairs.
    """

    models: dict[str, Measured] = field(default_factory=dict)
    references: list[float] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Found:
        models = {name: Measured(**one) for name, one in facts["models"].items()}
        return cls(**{**facts, "models": models})

    def accuracy(self) -> dict[str, Any] | None:
        """Share of pairs in which the chosen answer has the higher score; None without pairs."""
        return {**above(self.chosen, self.rejected), "pairs": len(self.chosen)} if self.chosen else None

    def in_order(self, base: str) -> dict[str, Measured]:
        """The models: the one before training, the one that the others are held against, and these."""
        return {
            name: self.models[name]
            for name in sorted(self.models, key=lambda name: (name != "start", name != base))
        }


def bounded(interval: Interval) -> dict[str, float | None]:
    """An interval as it is written: value, low and high, with null for a bound that is infinite."""
    numbers = {"value": interval.estimate, "low": interval.low, "high": interval.high}
    return {key: round(value, 6) if math.isfinite(value) else None for key, value in numbers.items()}


def above(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """How often the one number of a pair is above the other; a tie counts half."""
    won = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True))
    return bounded(intervals.share(won, len(ours)))


def rewarded(rewards: list[float], base: list[float] | None) -> dict[str, Any]:
    """The mean reward; and against other answers to the same prompts the gain, and the share won.

    Args:
        base: the other answers' rewards.
    """
    if not rewards:
        return {}
    numbers: dict[str, Any] = {"reward": bounded(intervals.mean(rewards))}
    if base is not None:
        gains = [mine - other for mine, other in zip(rewards, base, strict=True)]
        numbers["reward_gain"] = bounded(intervals.mean(gains))
        numbers["win_rate"] = above(rewards, base)
    return numbers


def divergence(mine: Measured) -> dict[str, float | None]:
    """The KL from the model that the others are held against, in nats an answer: k3 on the model's own samples."""
    lengths = [len(answer) for answer in mine.answers]
    flat = torch.tensor([number for row in mine.log_probs for number in row], dtype=torch.float64)
    base = torch.tensor([number for row in mine.base_log_probs for number in row], dtype=torch.float64)
    mask = ragged.mask(lengths, torch.device("cpu"))
    return bounded(intervals.mean(k3_kl(ragged.pad(flat, lengths), ragged.pad(base, lengths), mask).tolist()))


def worded(
    answers: list[list[int]], said: list[str], references: list[str] | None, eos_id: int
) -> dict[str, Any]:
    """How long the answers are, how many end by themselves, how many differ, and their BLEU.

    Args:
        said: the answers as text.
        references: the data's own answers to the same prompts, as text; None where it is these that are told of.
    """
    from sacrebleu import corpus_bleu

    count = len(answers)
    numbers: dict[str, Any] = {
        "answer_tokens": bounded(intervals.mean([float(len(answer)) for answer in answers])),
        "ended": sum(answer[-1] == eos_id for answer in answers) / count,
        "distinct": len(set(map(tuple, answers))) / count,
    }
    if references is not None:
        numbers["bleu"] = round(corpus_bleu(said, [references], force=True).score, 4)
    return numbers


def make_report(found: Found, held: HeldOut, base: str, spec: EvalSpec, tokenizer: Any) -> dict[str, Any]:
    """All that was found, as JSON; README explains the numbers.

    Args:
        base: the model that the others are held against.
    """
    against, eos_id = found.models.get(base), tokenizer.eos_token_id
    references = texts(held.asked.answers, tokenizer)
    models: dict[str, dict[str, Any]] = {}
    for name, one in found.in_order(base).items():
        models[name] = {"perplexity": one.perplexity}
        if against and name != base and one.preferences:
            models[name]["pair_accuracy"] = above(one.preferences, against.preferences)
        if not one.answers:
            continue
        models[name] |= rewarded(one.rewards, against.rewards if against and name != base else None)
        if name != base and spec.temperature > 0:  # only sampled answers tell the KL
            models[name]["kl"] = divergence(one)
        models[name] |= worded(one.answers, texts(one.answers, tokenizer), references, eos_id)
    if against is not None and against.answers:
        models["reference"] = rewarded(found.references, against.rewards)
        models["reference"] |= worded(held.asked.answers, references, None, eos_id)
    return {
        "base": base,
        "prompts": len(held.asked),
        "confidence": intervals.CONFIDENCE,
        "sampling": {name: getattr(spec, name) for name in ("temperature", "top_p", "top_k")},
        "reward_accuracy": found.accuracy(),
        "models": models,
    }


def lines(found: Found, held: HeldOut, base: str, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """For each prompt, every model's answer and its reward."""
    models = found.in_order(base)
    answers = {name: texts(one.answers, tokenizer) for name, one in models.items()}
    answers["reference"] = texts(held.asked.answers, tokenizer)
    rewards = {**{name: one.rewards for name, one in models.items()}, "reference": found.references}
    for number, question in enumerate(held.questions):
        yield {
            "prompt": question,
            "answers": {name: some[number] for name, some in answers.items()},
            "rewards": {name: round(some[number], 4) for name, some in rewards.items() if some},
        }


def texts(answers: list[list[int]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
