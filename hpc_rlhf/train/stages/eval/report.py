"""The reported numbers of an evaluation, with confidence intervals, from what was measured of each model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc_rlhf import intervals
from hpc_rlhf.intervals import Interval
from hpc_rlhf.spec.rewards import RewardItem
from hpc_rlhf.spec.stages import EvalSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.ppo import k3_kl
from hpc_rlhf.train.stages.eval.accuracy import Verdicts, accuracy_metrics, gain, judging, of_source, reward_means
from hpc_rlhf.train.stages.eval.questions import HeldOut


@dataclass
class Measured:
    """Measurements of one model on the held-out prompts, as checkpoints keep it; lists have one entry each.

    Attributes:
        perplexity: of held-out responses, given their prompts; None if there are none.
        answers: the model's first response to each prompt, as token ids.
        further: its other responses to each prompt.
        log_probs: of each response's tokens, by the model itself.
        base_log_probs: of the same tokens, by the base model; empty for the base model itself.
        preferences: log-probability of each held-out pair's chosen response minus that of the rejected one,
            in nats; of DPO's model and the base model, otherwise empty.
        rewards: the reward model's scores; empty without one.
        verdicts: what the rewards say about all responses.
    """

    perplexity: float | None = None
    answers: list[list[int]] = field(default_factory=list)
    further: list[list[list[int]]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)
    base_log_probs: list[list[float]] = field(default_factory=list)
    preferences: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    verdicts: Verdicts = field(default_factory=Verdicts)

    @property
    def first_right(self) -> list[float | None]:
        """1 where the first response to a prompt is right, 0 where it is wrong; empty if nothing judged it."""
        samples = 1 + len(self.further[0]) if self.further else 1
        return [None if good is None else float(good) for good in self.verdicts.right[::samples]]

    @property
    def responses(self) -> list[list[int]]:
        """All responses: those to the first prompt, then those to the second, and so on."""
        groups = zip(self.answers, self.further or [[]] * len(self.answers), strict=True)
        return [response for first, others in groups for response in (first, *others)]


@dataclass
class Results:
    """Results of an evaluation so far.

    Attributes:
        models: measurements of each model, the base model last.
        references: the reward model's scores of the data's own responses to the prompts; empty if some have none.
        chosen, rejected: its scores of the pairs.
    """

    models: dict[str, Measured] = field(default_factory=dict)
    references: list[float] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Results:
        models = {
            name: Measured(**{**one, "verdicts": Verdicts(**one.get("verdicts", {}))})
            for name, one in facts["models"].items()
        }
        return cls(**{**facts, "models": models})

    def accuracy(self) -> dict[str, Any] | None:
        """Share of pairs whose chosen response has the higher score; None without pairs."""
        return {**above(self.chosen, self.rejected), "pairs": len(self.chosen)} if self.chosen else None

    def in_order(self, base: str) -> dict[str, Measured]:
        """The models: the one before training, the base model, and the others."""
        return {
            name: self.models[name] for name in sorted(self.models, key=lambda name: (name != "start", name != base))
        }


def bounded(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON: value, low and high, with null for an infinite bound."""
    numbers = {"value": interval.estimate, "low": interval.low, "high": interval.high}
    return {key: round(value, 6) if math.isfinite(value) else None for key, value in numbers.items()}


def above(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """How often ours is above theirs; a tie counts half."""
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True))
    return bounded(intervals.share(wins, len(ours)))


def rewarded(rewards: list[float], base: list[float] | None) -> dict[str, Any]:
    """The mean reward, and compared with the rewards ``base`` on the same prompts the gain and the win rate."""
    if not rewards:
        return {}
    numbers: dict[str, Any] = {"reward": bounded(intervals.mean(rewards))}
    if base is not None:
        gains = [mine - other for mine, other in zip(rewards, base, strict=True)]
        numbers["reward_gain"] = bounded(intervals.mean(gains))
        numbers["win_rate"] = above(rewards, base)
    return numbers


def divergence(measured: Measured) -> dict[str, float | None]:
    """The KL divergence from the base model in nats per response: k3 on the model's own samples."""
    lengths = [len(answer) for answer in measured.answers]
    flat = torch.tensor([number for row in measured.log_probs for number in row], dtype=torch.float64)
    base = torch.tensor([number for row in measured.base_log_probs for number in row], dtype=torch.float64)
    mask = ragged.mask(lengths, torch.device("cpu"))
    return bounded(intervals.mean(k3_kl(ragged.pad(flat, lengths), ragged.pad(base, lengths), mask).tolist()))


def verified(measured: Measured, base: Measured | None, samples: int, sources: list[str]) -> dict[str, Any]:
    """Accuracy, compared with that of ``base``, and the mean of each reward; ``sources`` has the accuracy by source."""
    ours = measured.verdicts
    accuracy = accuracy_metrics(ours, samples)
    gained = gain(ours, base.verdicts, samples) if base is not None else None
    numbers: dict[str, Any] = {name: bounded(one) for name, one in accuracy.items()}
    numbers |= {"accuracy_gain": bounded(gained)} if gained is not None else {}
    numbers |= {name: bounded(one) for name, one in reward_means(ours, samples).items()}
    if accuracy and len(set(sources)) > 1:
        by_source = {one: of_source(ours, samples, sources, one) for one in sorted(set(sources))}
        numbers["sources"] = {
            one: {name: bounded(number) for name, number in accuracy_metrics(part, samples).items()}
            for one, part in by_source.items()
        }
    return numbers


def text_metrics(
    responses: list[list[int]], as_text: list[str], references: list[str] | None, eos_id: int
) -> dict[str, Any]:
    """Length of the responses, how many end with EOS, how many are distinct, and their BLEU if there are references."""
    from sacrebleu import corpus_bleu

    count = len(responses)
    numbers: dict[str, Any] = {
        "answer_tokens": bounded(intervals.mean([float(len(response)) for response in responses])),
        "ended": sum(response[-1] == eos_id for response in responses) / count,
        "distinct": len(set(map(tuple, responses))) / count,
    }
    if references is not None:
        numbers["bleu"] = round(corpus_bleu(as_text, [references], force=True).score, 4)
    return numbers


def make_report(
    results: Results, held: HeldOut, base: str, spec: EvalSpec, tokenizer: Any, rewards: Sequence[RewardItem] = ()
) -> dict[str, Any]:
    """The report as JSON, compared with the model ``base``; docs/evaluation.md explains the numbers.

    Args:
        rewards: what judged the responses.
    """
    base_model, eos_id = results.models.get(base), tokenizer.eos_token_id
    references = texts(held.prompts.responses, tokenizer) if held.has_references else None
    models: dict[str, dict[str, Any]] = {}
    for name, one in results.in_order(base).items():
        models[name] = {"perplexity": one.perplexity}
        if base_model and name != base and one.preferences:
            models[name]["pair_accuracy"] = above(one.preferences, base_model.preferences)
        if not one.answers:
            continue
        compared = base_model if name != base else None
        models[name] |= verified(one, compared, spec.samples, held.sources)
        models[name] |= rewarded(one.rewards, compared.rewards if compared else None)
        if name != base and spec.samples_all:  # others are no samples to estimate it from
            models[name]["kl"] = divergence(one)
        models[name] |= text_metrics(one.answers, texts(one.answers, tokenizer), references, eos_id)
    if base_model is not None and base_model.answers and references is not None:
        models["reference"] = rewarded(results.references, base_model.rewards)
        models["reference"] |= text_metrics(held.prompts.responses, references, None, eos_id)
    return {
        "base": base,
        "prompts": len(held.prompts),
        "confidence": intervals.CONFIDENCE,
        "sampling": {name: getattr(spec, name) for name in ("temperature", "top_p", "top_k")},
        "samples": spec.samples,
        "judged_by": list(judging(rewards)),
        "reward_accuracy": results.accuracy(),
        "models": models,
    }


def lines(results: Results, held: HeldOut, base: str, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """For each prompt, every model's first response and its reward: the reward model's, or else 1 for a right one and 0
    for a wrong one. Further responses follow."""
    models = results.in_order(base)
    answers = {name: texts(one.answers, tokenizer) for name, one in models.items()}
    if held.has_references:
        answers["reference"] = texts(held.prompts.responses, tokenizer)
    rewards: dict[str, Sequence[float | None]] = {name: one.rewards or one.first_right for name, one in models.items()}
    rewards["reference"] = results.references
    further = {
        name: [texts(others, tokenizer) for others in one.further] for name, one in models.items() if any(one.further)
    }
    for number, question in enumerate(held.questions):
        yield {
            "prompt": question,
            "answers": {name: some[number] for name, some in answers.items()},
            "rewards": {
                name: round(reward, 4)
                for name, some in rewards.items()
                if some and (reward := some[number]) is not None
            },
            **({"further": {name: some[number] for name, some in further.items()}} if further else {}),
        }


def texts(responses: list[list[int]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(response, skip_special_tokens=True).strip() for response in responses]
