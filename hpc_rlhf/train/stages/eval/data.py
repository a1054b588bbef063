"""The data of an evaluation: held-out samples of the stages that were trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.stages.learner import EVALUATED


@dataclass(frozen=True)
class HeldOut:
    """What the models are evaluated on, as token ids.

    Attributes:
        questions: the prompts as text.
        prompts: prompts that every model answers, with the data's own responses.
        texts: prompts with the chosen responses whose perplexity is measured.
        pairs: prompts with chosen and with rejected responses; empty if no stage learned from pairs.
    """

    questions: list[str]
    prompts: Rollout
    texts: Rollout
    pairs: tuple[Rollout, Rollout]


def held_out(context: StageContext, prompts: int) -> HeldOut:
    """The held-out samples of the stages that were trained. Collective.

    Args:
        prompts: number of prompts to answer, at most.

    Raises:
        HpcRlhfError: nothing is held out.
    """
    trained = context.spec.trained

    def rows(*stages: str) -> Any:
        """The held-out rows of the first of these stages that was trained."""
        for stage in stages:
            if stage in trained:
                folder = context.run.stage(stage).data
                with context.stop.cancellable():
                    return prepare(
                        context.spec, stage, context.tokenizer, folder, context.world, context.stop.should_stop
                    ).held_out
        return []

    def rollout(samples: list[dict[str, Any]], column: str) -> Rollout:
        return Rollout.of([row["prompt_ids"] for row in samples], [row[column] for row in samples])

    source = rows("ppo", "dpo", "sft", "reward")
    by_prompt: dict[str, dict[str, Any]] = {}
    for place in range(len(source)):
        row = source[sample_at(place, len(source), context.spec.seed, "eval")]
        if row["prompt"] and len(by_prompt) < prompts:
            by_prompt.setdefault(row["prompt"], row)
    chosen = list(by_prompt.values())
    texts = rows("sft")
    pairs = rows("reward", "dpo")
    pairs = [pairs[i] for i in range(min(EVALUATED, len(pairs)))]
    if not (chosen or len(texts) or pairs):
        raise HpcRlhfError("no samples are held out", "data.held_out", "raise it in a new run", exit_code=RUN_FAILED)
    return HeldOut(
        questions=list(by_prompt),
        prompts=rollout(chosen, "chosen_ids"),
        texts=rollout([texts[i] for i in range(min(EVALUATED, len(texts)))] or chosen, "chosen_ids"),
        pairs=(rollout(pairs, "chosen_ids"), rollout(pairs, "rejected_ids")),
    )
