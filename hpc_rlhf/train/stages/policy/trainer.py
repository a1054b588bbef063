"""The steps that PPO and GRPO share: responses to given prompts, minibatches, and the optimizer steps on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms import importance, ppo
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.rewards.blend import Blend, Scores
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, RolloutBackend, Sampling
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.policy.minibatches import Minibatch, Sizes, counted, micro_batches, rows_of
from hpc_rlhf.train.stages.policy.progress import E, Progress
from hpc_rlhf.train.stages.rollout import learning_backend

# Further losses for an optimizer step of the actor, made from its engine; they add to the stats.
Mixture = Callable[[Any, dict[str, Tensor]], list[Callable[[], Tensor]]]

T = TypeVar("T", bound="PolicyTrainer[Any]")

ACTOR = "actor"


@dataclass
class PolicyTrainer(Generic[E]):
    """What PPO's and GRPO's trainers share.

    Attributes:
        backend: generates responses with the actor.
        rewards: scores them.
        check: called before each micro-batch with the kind of work; it may raise. Collective.
        mismatch: metrics of ``corrected`` for the last experience; empty if the backend gave no log-probabilities.
    """

    spec: PolicySpec
    models: Any
    backend: RolloutBackend
    rewards: RewardSource
    eos_id: int
    sizes: Sizes
    world: World
    check: Callable[[str], object] = lambda kind: None

    kind: ClassVar[Any]  # the class of the experience
    # The networks that learn from each minibatch, in this order, the actor first.
    networks: ClassVar[tuple[str, ...]] = (ACTOR,)
    # The names of the sums over all optimizer steps on an experience, in the order in which checkpoints keep them.
    stats: ClassVar[tuple[str, ...]]

    @classmethod
    def of(cls: type[T], context: StageContext, spec: PolicySpec, models: Any, rewards: RewardSource) -> T:
        """The trainer of a stage. Collective."""
        world, eos_id = context.world, context.tokenizer.eos_token_id
        backend = learning_backend(context, spec.rollout, models.policy)
        return cls(spec, models, backend, rewards, eos_id, Sizes.of(context), world, context.stop.check)

    def __post_init__(self) -> None:
        self._kept: Any = None  # the actor's output in an evaluation with its graph, to learn from
        self._kept_rollout: Rollout | None = None
        self.mismatch: dict[str, float | None] = {}

    @property
    def state(self) -> dict[str, Any]:
        """What carries over from rollout to rollout, besides the models, as JSON."""
        raise NotImplementedError

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """Passes over each experience."""
        raise NotImplementedError

    def denominator(self, minibatch: Minibatch) -> float:
        """What a minibatch's losses, summed over all ranks, are divided by."""
        return minibatch.all_tokens

    def count_learned(self, minibatch: Minibatch, stats: dict[str, Tensor]) -> None:
        """Add to the stats how much the actor has learned from."""
        stats["tokens"] += minibatch.own_tokens

    def penalty(self, experience: E, rows: list[int], log_probs: Tensor) -> Tensor | float:
        """What is added to the actor's summed loss on a micro-batch.

        Args:
            log_probs: (rows, response), the actor's, with gradients.
        """
        return 0.0

    # Rollout

    def roll_out(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[object, ...]],
        should_stop: Callable[[], bool], group_size: int = 1,
    ) -> Rollout:  # fmt: skip
        """Sample a response to each of this rank's prompts, with the arguments of ``request``. Collective.

        Raises:
            RolloutCancelled: ``should_stop`` returned True.
        """
        self.backend.sync_weights(self.models.policy)
        return self.backend.generate(self.request(prompts, keys, should_stop, group_size))

    def request(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[object, ...]],
        should_stop: Callable[[], bool], group_size: int = 1,
    ) -> GenerationRequest:  # fmt: skip
        """What a rollout asks for."""
        sampling = Sampling(self.spec.temperature, self.spec.top_p, self.spec.top_k)
        return GenerationRequest(
            prompts, self.sizes.response, self.eos_id, sampling, keys, should_stop=should_stop, group_size=group_size
        )

    # Evaluation

    def score(self, rollout: Rollout, columns: Mapping[str, Sequence[Any]]) -> Scores:
        """What the rewards give each response. Collective.

        Args:
            columns: further columns of the data, with an entry for each response.
        """
        if isinstance(self.rewards, Blend):
            return self.rewards.details(rollout.prompts, rollout.responses, columns)
        total: list[float | None] = []
        for rows in rows_of(rollout, self.spec.minibatches):  # so that a reward model sees the same micro-batches
            own = {name: column[rows] for name, column in columns.items()}
            total += self.rewards.score(rollout.prompts[rows], rollout.responses[rows], own)
        return Scores(total, {}, [False] * len(total))

    def evaluate(self, rollout: Rollout, columns: Mapping[str, Sequence[Any]] | None = None) -> E:
        """``evaluate_scored`` with the rewards' scores. Collective.

        Args:
            columns: as for ``score``.
        """
        return self.evaluate_scored(rollout, self.score(rollout, columns or {}))

    def evaluate_scored(self, rollout: Rollout, scored: Scores) -> E:
        """A rollout with its scores as an experience. Collective."""
        raise NotImplementedError

    def corrected(self, experience: E) -> E:
        """The experience with advantages that account for the difference between the log-probabilities by which tokens
        were drawn and the actor's: see ``algorithms/importance.py``. Collective.

        ``mismatch`` then has sampler_kl, the KL of the actor from what drew the tokens (k3, nats per token), its
        maximum, and importance_clipfrac, the share of the tokens whose weight was truncated.
        """
        rollout, mask, world = experience.rollout, experience.mask, self.world
        if rollout.log_probs is None:
            return experience
        sampler = ragged.pad(rollout.log_probs.to(world.device), rollout.response_lengths)
        weights, truncated = importance.truncated_weights(
            experience.log_probs, sampler, self.spec.rollout.importance_cap
        )  # fmt: skip
        kl = importance.mismatch_kl(experience.log_probs, sampler)[mask].double()
        own = {"tokens": float(len(kl)), "kl": kl.sum().item(), "truncated": truncated[mask].sum().item()}
        total = world.sums(own)
        largest = max(world.gather_data(kl.max().item() if len(kl) else 0.0))
        tokens = total["tokens"] or 1.0
        self.mismatch = {
            "sampler_kl": total["kl"] / tokens,
            "sampler_kl_max": largest,
            "importance_clipfrac": total["truncated"] / tokens,
        }
        return replace(experience, advantages=experience.advantages * weights)

    # Learning

    def micro_batches(self, rollout: Rollout, key: tuple[object, ...] = (), epoch: int = 0) -> list[list[list[int]]]:
        """``minibatches.micro_batches`` of a rollout. Collective."""
        return micro_batches(rollout, self.spec.minibatches, self.sizes.budget, self.world, key, epoch)

    def begin(self, experience: E) -> Progress[E]:
        return Progress.begin(experience, self.networks, self.stats)

    def saved_progress(self, folder: Path, done: int) -> Progress[E]:
        """The progress in a checkpoint.

        Args:
            done: optimizer steps made.
        """
        world, kind = self.world, self.kind
        return Progress.load(folder, world.rank, done, world.device, kind, self.networks, self.stats)

    def learn(
        self, experience: E | Progress[E], mixture: Mixture | None = None,
        before: Callable[[Progress[E]], None] = lambda progress: None, key: tuple[object, ...] = (),
    ) -> dict[str, float]:  # fmt: skip
        """All optimizer steps on an experience. Returns ``Progress.sums``. Collective.

        Args:
            experience: or the progress of an earlier attempt, whose remaining steps are then made.
            before: called before each optimizer step with the progress so far.
            key: the experience's; every pass after the first shuffles its minibatches by it.
        """
        progress = experience if isinstance(experience, Progress) else self.begin(experience)
        stats = progress.stats
        if progress.experience.rollout is not self._kept_rollout:
            self._kept = None
        planned, minibatches, count = -1, [], len(self.networks)
        while (epoch := progress.done // (count * self.spec.minibatches)) < self.passes:
            if epoch != planned:
                plans = self.micro_batches(progress.experience.rollout, key, epoch)
                planned, minibatches = epoch, counted(progress.experience, plans, self.world)
            before(progress.copy())
            place, network = divmod(progress.done % (count * self.spec.minibatches), count)
            minibatch = minibatches[place]
            progress.done += 1
            self._learn_from(minibatch, self.networks[network], progress, mixture)
            if network < count - 1:
                continue
            self.count_learned(minibatch, stats)
            if self.models.ema and not progress.actor_skipped:
                self.models.ema.update()
            if self._too_far(stats["approx_kl"] - progress.kl_before, minibatch.all_tokens):
                left = self.passes * self.spec.minibatches - progress.done // count
                for name in self.networks:
                    getattr(self.models, name).lr_scheduler.skip(left)
                break
        return progress.sums()

    def _learn_from(self, minibatch: Minibatch, network: str, progress: Progress[E], mixture: Mixture | None) -> None:
        """A network's optimizer step on a minibatch. Collective."""
        loss, engine = getattr(self, f"_{network}_loss"), getattr(self.models, network)
        scale = self.sizes.loss_factor / (self.denominator(minibatch) or 1.0)
        losses: list[Callable[[], Tensor]] = [
            partial(loss, progress.experience, rows, scale, progress.stats) for rows in minibatch.plan
        ]
        if network == ACTOR:
            progress.kl_before = progress.stats["approx_kl"].clone()
            losses += mixture(engine, progress.stats) if mixture else []
        kind = f"the {network}'s micro-batches"
        result = engines.optimizer_step(engine, [partial(self._checked, kind, each) for each in losses])
        progress.count(network, result)
        if network == ACTOR:
            progress.actor_skipped = not result.applied

    def _checked(self, kind: str, call: Callable[..., Any], *inputs: Any) -> Any:
        self.check(kind)
        return call(*inputs)

    def _too_far(self, kl: Tensor, tokens: float) -> bool:
        """True if the actor drifted past ``stop_kl`` from the policy that sampled. Collective."""
        limit = self.spec.stop_kl
        return limit is not None and self.world.sums({"kl": kl.item()})["kl"] / (tokens or 1.0) > limit

    def _keeping(self, rollout: Rollout, plan: list[list[int]]) -> Any:
        """The actor for evaluation, perhaps keeping its graph.

        If the rollout is one micro-batch, the first update starts with exactly the actor's forward pass of the
        evaluation, so it is kept for it. It comes last there, and needs no memory that learning would not.
        """
        self._kept, self._kept_rollout = None, rollout
        if len(plan) > 1 or self.spec.dropout:
            return self.models.actor

        def forward(*inputs: Any) -> Any:
            with torch.enable_grad():
                self._kept = self.models.actor(*inputs)
            return tuple(output.detach() for output in self._kept)

        return forward

    def _actor(self, experience: E, rows: list[int], with_entropies: bool = False) -> Any:
        batch, response = experience.rollout.batch(rows or [0], self.world.device)
        return self.models.actor(batch.ids, batch.lengths, response, self.spec.temperature, with_entropies)

    def _actor_loss(self, experience: E, rows: list[int], scale: float, stats: dict[str, Tensor]) -> Tensor:
        """A micro-batch's clipped surrogate loss, times the scale; adds to the stats."""
        (flat, _), self._kept = self._kept or self._actor(experience, rows), None
        log_probs, (old, advantages, mask) = padded(
            experience, rows, flat, experience.log_probs, experience.advantages, experience.mask
        )
        ranges = self.spec.clip_ranges
        loss, clipped, ratio = ppo.policy_loss_sum(log_probs, old, advantages, mask, *ranges)
        kl = ppo.k3_kl(old, log_probs.detach(), mask).sum()
        real = bool(rows)  # an empty micro-batch only keeps ranks in sync
        loss = loss + self.penalty(experience, rows or [0], log_probs)
        for name, value in {"actor_loss": loss, "clipped": clipped, "ratio": ratio, "approx_kl": kl}.items():
            stats[name] += value.detach() * real
        return loss * (scale * real)


def padded(experience: E, rows: list[int], flat: Tensor, *columns: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Packed numbers of some rows as (rows, response), and the same rows of (batch, response) columns."""
    rows = rows or [0]
    numbers = ragged.pad(flat, [experience.rollout.response_lengths[row] for row in rows])
    return numbers, tuple(column[rows, : numbers.shape[1]] for column in columns)


def as_tensor(scores: Sequence[float | None], device: torch.device) -> Tensor:
    """(batch,), float32; NaN where there is no score."""
    return torch.tensor([torch.nan if score is None else score for score in scores], dtype=torch.float32, device=device)
