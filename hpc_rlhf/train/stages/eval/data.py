"""What an evaluation is made on: the held-out samples of the stages that were trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.data.tokenized import prepare
from hpc_rlhf.train.rollout.experience import Rollout
from hpc_rlhf.train.stages.common import EVALUATED


@dataclass(frozen=True)
class HeldOut:
    """What the models are measured on, as token ids.

    Attributes:
        questions: the prompts as text.
        asked: prompts that every model answers, with the data's own answers.
        told: prompts with the chosen answers whose perplexity is measured.
        pairs: prompts with their chosen and with their rejected answers; empty where no stage learnt from pairs.
    """

    questions: list[str]
    asked: Rollout
    told: Rollout
    pairs: tuple[Rollout, Rollout]


def held_out(context: StageContext, prompts: int) -> HeldOut:
    """The held-out samples of the stages that were trained. Collective.

    Args:
        prompts: how many are answered, at most.

    Raises:
        HpcRlhfError: nothing is held out.
    """
    trained = context.spec.trained

    def rows(*stages: str) -> Any:
        """Of the first of these stages that was trained."""
        for stage in stages:
            if stage in trained:
                folder = context.run.stage(stage).data
                with context.stop.cancellable():
                    return prepare(
                        context.spec,
                        stage,
                        context.tokenizer,
                        folder,
                        context.world,
                        context.stop.should_stop,
                    ).held_out
        return []

    def rollout(chosen: list[dict[str, Any]], answer: str) -> Rollout:
        return Rollout([row["prompt_ids"] for row in chosen], [row[answer] for row in chosen])

    source = rows("ppo", "dpo", "sft", "reward")
    asked: dict[str, dict[str, Any]] = {}
    for place in range(len(source)):
        row = source[sample_at(place, len(source), context.spec.seed, "eval")]
        if row["prompt"] and len(asked) < prompts:
            asked.setdefault(row["prompt"], row)
    chosen = list(asked.values())
    told = rows("sft")
    pairs = rows("reward", "dpo")
    pairs = [pairs[i] for i in range(min(EVALUATED, len(pairs)))]
    if not (chosen or len(told) or pairs):
        raise HpcRlhfError(
            "not one sample is held out", "data.held_out", "raise it in a new run", exit_code=RUN_FAILED
        )
    return HeldOut(
        questions=list(asked),
        asked=rollout(chosen, "chosen_ids"),
        told=rollout([told[i] for i in range(min(EVALUATED, len(told)))] or chosen, "chosen_ids"),
        pairs=(rollout(pairs, "chosen_ids"), rollout(pairs, "rejected_ids")),
    )
