"""The evaluation of an actor on held-out prompts."""

from __future__ import annotations

import torch

from hpc_rlhf.spec.sizes import EVALUATED_PROMPTS
from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.arrow import Rows
from hpc_rlhf.train.data.further import columns_of
from hpc_rlhf.train.ragged import balance_ranks, pack_micro_batches, split_to_count
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.stages.learner import evaluated_rows
from hpc_rlhf.train.stages.policy.progress import E
from hpc_rlhf.train.stages.policy.trainer import PolicyTrainer


def evaluate(context: StageContext, trainer: PolicyTrainer[E], rows: Rows) -> dict[str, float | None]:
    """What the actor's responses to held-out prompts are like. They are sampled as in training, with the same random
    numbers in every evaluation. Collective.

    Returns:
        reward of the scores, kl, eos_rate and answer_tokens as in training; see ``summarize``.
    """
    world, seed = context.world, context.spec.seed
    chosen = [rows[place] for place in evaluated_rows(len(rows), seed, EVALUATED_PROMPTS)]
    prompts = [row["prompt_ids"] for row in chosen]
    own = balance_ranks([len(prompt) for prompt in prompts], world.dims.data)[world.data_rank]
    # A rank without a prompt answers one that does not count: the forward passes may be collective.
    counts, own = bool(own), own or [0]
    keys: list[tuple[object, ...]] = [(seed, "held out", number) for number in own]
    with context.stop.cancellable():
        rollout = trainer.roll_out([prompts[number] for number in own], keys, context.stop.should_stop)
    columns = columns_of([chosen[number] for number in own])
    scores = trainer.rewards.score(rollout.prompts, rollout.responses, columns)
    numbers = [score for score in scores if score is not None]
    has_kl = trainer.models.ref is not None and not trainer.spec.truncates
    measured = {
        "reward": sum(numbers),
        "scores": float(len(numbers)),
        "kl": _kl(context, trainer, rollout) if has_kl else 0.0,
        "ended": rollout.ended(trainer.eos_id, world.device).sum().item(),
        "tokens": float(sum(rollout.response_lengths)),
        "responses": float(len(rollout)),
    }
    total = world.sums({name: value * counts for name, value in measured.items()})
    return {
        "reward": total["reward"] / total["scores"] if total["scores"] else None,
        "kl": total["kl"] / total["responses"] if has_kl else None,
        "eos_rate": total["ended"] / total["responses"],
        "answer_tokens": total["tokens"] / total["responses"],
    }


@torch.no_grad()
def _kl(context: StageContext, trainer: PolicyTrainer[E], rollout: Rollout) -> float:
    """The KL from the reference, summed over this rank's responses, in nats. Collective."""
    world, models, total = context.world, trainer.models, 0.0
    bins = pack_micro_batches(rollout.lengths, trainer.sizes.budget)
    models.actor.eval()
    for rows in split_to_count(bins, world.max(len(bins))):
        context.stop.check("evaluation")
        batch, response = rollout.batch(rows or [0], world.device)
        actor, ref = (
            model(batch.ids, batch.lengths, response, trainer.spec.temperature)[0].unsqueeze(0)
            for model in (models.actor, models.ref)
        )
        if rows:  # an empty micro-batch only keeps ranks in sync
            total += ppo.k3_kl(actor, ref, torch.ones_like(actor, dtype=torch.bool)).item()
    models.actor.train()
    return total
