"""How a rollout is divided into minibatches, and these into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import exchanged
from hpc_rlhf.train.ragged import pack_micro_batches, split_to_count
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.rollout.experience import Evaluated
from hpc_rlhf.train.runtime.world import World


@dataclass(frozen=True)
class Sizes:
    """How much is processed at a time."""

    budget: int  # tokens per micro-batch
    response: int  # tokens of the longest response
    loss_factor: float  # for a loss that is divided by the global token count; see StageContext

    @classmethod
    def of(cls, context: StageContext) -> Sizes:
        budget = context.batch.micro * context.longest
        return cls(budget, context.spec.data.max_answer_tokens, context.loss_factor)


@dataclass(frozen=True)
class Minibatch:
    """A minibatch of an experience. Only responses that take part in training count."""

    plan: list[list[int]]  # the rows of each micro-batch
    own_tokens: float  # of the responses on this rank
    own_responses: float
    all_tokens: float  # of the responses on all ranks
    all_responses: float


def rows_of(rollout: Rollout, minibatches: int) -> list[slice]:
    """The rows of each minibatch in the first pass, which takes them as they were sampled: in random order."""
    share = len(rollout) // minibatches
    return [slice(first, first + share) for first in range(0, len(rollout), share)]


def micro_batches(
    rollout: Rollout, minibatches: int, budget: int, world: World, key: tuple[object, ...] = (), epoch: int = 0
) -> list[list[list[int]]]:
    """The rows of each micro-batch of each minibatch, equally many on all ranks. Collective.

    Args:
        budget: tokens per micro-batch.
        key: the experience's; every pass after the first shuffles its minibatches by it.
    """
    chosen = [list(range(len(rollout)))[rows] for rows in rows_of(rollout, minibatches)]
    if epoch:
        chosen = exchanged(chosen, world.data_rank, *key, epoch)
    plans = []
    for minibatch in chosen:
        bins = pack_micro_batches([rollout.lengths[row] for row in minibatch], budget)
        bins = split_to_count(bins, world.max(len(bins)))
        plans.append([[minibatch[place] for place in places] for places in bins])
    return plans


def counted(experience: Evaluated, plans: list[list[list[int]]], world: World) -> list[Minibatch]:
    """Minibatches, given the rows of their micro-batches. Collective."""
    lengths = experience.mask.sum(dim=1).tolist()
    minibatches = []
    for plan in plans:
        taking_part = [lengths[row] for rows in plan for row in rows if lengths[row]]
        own = {"tokens": float(sum(taking_part)), "responses": float(len(taking_part))}
        minibatches.append(Minibatch(plan, *own.values(), *world.sums(own).values()))
    return minibatches
