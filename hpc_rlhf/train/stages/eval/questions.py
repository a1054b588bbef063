"""What an evaluation asks the models: held-out samples of the stages that were trained, and the answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import rounds
from hpc_rlhf.spec.stages import BASE, EVALUATION, Data, EvalSpec, kind_of
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.further import columns_of
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.ragged import balance_ranks, plan_step
from hpc_rlhf.train.rewards.blend import Blend, Scores
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, RolloutBackend, Sampling
from hpc_rlhf.train.stages.learner import evaluated_rows


@dataclass(frozen=True)
class HeldOut:
    """What the models are evaluated on, as token ids.

    Attributes:
        questions: the prompts as text.
        prompts: prompts that every model answers, with the data's own responses.
        texts: prompts with the chosen responses whose perplexity is measured.
        pairs: prompts with chosen and with rejected responses; empty if no stage learned from pairs.
        columns: the further columns of the data, with an entry for each prompt.
        sources: the data source of each prompt; empty if no stage has rewards.
    """

    questions: list[str]
    prompts: Rollout
    texts: Rollout
    pairs: tuple[Rollout, Rollout]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)

    @property
    def has_references(self) -> bool:
        """Whether the data has a response to every prompt."""
        return 0 not in self.prompts.response_lengths


def held_out(context: StageContext, prompts: int) -> HeldOut:
    """The held-out samples, with at most ``prompts`` prompts to answer. Collective.

    Raises:
        HpcRlhfError: nothing is held out.
    """
    spec, stop = context.spec, context.stop

    def rows(stages: Sequence[str], of: JobSpec = spec) -> Any:
        """The held-out rows of the first of these stages of a spec."""
        if not stages:
            return []
        folder = (context.run.stage(stages[0]) if of is spec else context.files).data
        with stop.cancellable():
            return prepare(of, stages[0], context.tokenizer, folder, context.world, stop.should_stop).held_out

    def trained_on(data: Data) -> list[str]:
        return [stage for stage in spec.trained if kind_of(stage).data is data]

    def rollout(samples: list[dict[str, Any]], column: str) -> Rollout:
        # A text without BOS has no prompt, and its first token cannot be predicted.
        rows = [(row["prompt_ids"] + row[column], len(row["prompt_ids"]) or 1) for row in samples]
        return Rollout.of([ids[:first] for ids, first in rows], [ids[first:] for ids, first in rows])

    def sampled_rows(all_rows: Any) -> list[dict[str, Any]]:
        return [all_rows[place] for place in evaluated_rows(len(all_rows), spec.seed)]

    # The prompts of the first policy trained from the base; without one, the base's own, or else the reward model's.
    first = _asked(spec)
    by_preference = sorted(first.shares, key=lambda stage: (not kind_of(stage).makes_policy, stage == BASE.name))
    source = rows(by_preference, first)
    by_prompt: dict[str, dict[str, Any]] = {}
    for place in range(len(source)):
        row = source[sample_at(place, len(source), spec.seed, "eval")]
        if row["prompt"] and row.get("label", 1.0) and len(by_prompt) < prompts:
            by_prompt.setdefault(row["prompt"], row)
    chosen = list(by_prompt.values())
    texts, pairs = sampled_rows(rows(trained_on(Data.ANSWERS))), sampled_rows(rows(trained_on(Data.PAIRS)))
    if not (chosen or texts or pairs):
        raise HpcRlhfError("no samples are held out", "data.held_out", "raise it in a new run")
    return HeldOut(
        questions=list(by_prompt),
        prompts=rollout(chosen, "chosen_ids"),
        texts=rollout(texts or [row for row in chosen if row["chosen_ids"]], "chosen_ids"),
        pairs=(rollout(pairs, "chosen_ids"), rollout(pairs, "rejected_ids")),
        columns=columns_of(chosen),
        sources=[row["source"] for row in chosen if "source" in row],
    )


def _asked(spec: JobSpec) -> JobSpec:
    """The spec whose held-out prompts are asked, the same in all rounds: that of the first, without votes, which only
    some rounds have, unless there is nothing else."""
    first = rounds(spec)[0]
    sources = tuple(source for source in first.data.sources if not source.feedback) or first.data.sources
    if first is spec and sources == spec.data.sources:
        return spec
    assert spec.evaluation is not None
    judged = spec.evaluation.model_copy(update={"rewards": spec.evaluated_rewards or None})
    stages = first.stages.model_copy(update={EVALUATION.name: judged})
    data = first.data.model_copy(update={"sources": sources})
    return first.model_copy(update={"data": data, "stages": stages})


class Questions:
    """Asks models, distributed over the ranks.

    Results are the same for any number of ranks, and known to every rank. All methods are collective, and the attempt
    may stop between pieces of work.
    """

    def __init__(self, context: StageContext, spec: EvalSpec) -> None:
        self.context = context
        self.spec = spec
        self.budget = context.batch.micro * context.longest

    def responses(self, backend: RolloutBackend, prompts: list[list[int]]) -> list[list[list[int]]]:
        """A model's responses to each prompt; each has its own random numbers, the same for all models."""
        context, spec = self.context, self.spec
        if not prompts:
            return []
        own = self._own_rows([len(prompt) for prompt in prompts])
        request = GenerationRequest(
            [prompts[i] for i in own for _ in range(spec.samples)],
            context.spec.data.max_answer_tokens,
            context.tokenizer.eos_token_id,
            Sampling(spec.temperature or 1.0, spec.top_p, spec.top_k, greedy=spec.temperature == 0),
            [(context.spec.seed, "eval", i, *([j] if j else [])) for i in own for j in range(spec.samples)],
            should_stop=context.stop.should_stop,
            group_size=spec.samples,
        )
        with context.stop.cancellable():
            rollout = backend.generate(request)
        responses = iter(rollout.responses)
        return self._combine({i: list(islice(responses, spec.samples)) for i in own})

    def details(self, rewards: Blend, rollout: Rollout, columns: Mapping[str, list[Any]]) -> Scores:
        """Everything that rewards give each prompt with its response.

        Args:
            columns: with an entry for each of them.
        """
        own = self._own_rows(rollout.lengths)
        prompts, responses = [rollout.prompts[i] for i in own], [rollout.responses[i] for i in own]
        scores = rewards.details(prompts, responses, {name: [cells[i] for i in own] for name, cells in columns.items()})
        rows = zip(*scores.parts.values(), strict=True)
        combined = self._combine(dict(zip(own, zip(scores.total, rows, scores.failed, strict=True), strict=True)))
        parts = {name: [row[place] for _, row, _ in combined] for place, name in enumerate(scores.parts)}
        return Scores([total for total, _, _ in combined], parts, [failed for _, _, failed in combined])

    def scores(self, rewards: RewardSource, rollout: Rollout) -> list[float]:
        """The score of each prompt with its response."""
        own = self._own_rows(rollout.lengths)
        prompts, responses = [rollout.prompts[i] for i in own], [rollout.responses[i] for i in own]
        scores = rewards.score(prompts, responses, {})
        return self._combine(dict(zip(own, scores, strict=True)))

    @torch.no_grad()
    def log_probs(self, engine: Any, rollout: Rollout, temperature: float) -> list[list[float]]:
        """Log-probabilities of each response's tokens."""
        if not len(rollout):
            return []
        world = self.context.world
        results: dict[int, list[float]] = {}
        for rows in plan_step(rollout.lengths, world.size, self.budget)[world.rank]:
            self.context.stop.check("evaluation")
            batch, response = rollout.batch(rows or [0], world.device)
            flat, _ = engine(batch.ids, batch.lengths, response, temperature)
            if rows:  # an empty micro-batch only keeps ranks in sync
                parts = flat.split([rollout.response_lengths[row] for row in rows])
                results.update(zip(rows, [part.tolist() for part in parts], strict=True))
        return self._combine(results)

    def likelihoods(self, engine: Any, rollout: Rollout) -> list[float]:
        """Log-probability of each whole response, at temperature 1."""
        return [torch.tensor(row, dtype=torch.float64).sum().item() for row in self.log_probs(engine, rollout, 1.0)]

    def _own_rows(self, lengths: tuple[int, ...] | list[int]) -> list[int]:
        world = self.context.world
        return balance_ranks(lengths, world.size)[world.rank]

    def _combine(self, own: dict[int, Any]) -> list[Any]:
        """All ranks' results, by row."""
        results = {row: one for part in self.context.world.gather(list(own.items())) for row, one in part}
        return [results[row] for row in range(len(results))]
