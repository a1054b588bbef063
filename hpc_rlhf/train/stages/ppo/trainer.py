"""The steps of PPO on given prompts: responses, their evaluation, and learning from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.algorithms.advantages import AdvantageEstimator, Gae
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.data.sampler import exchanged
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.ragged import pack_micro_batches, split_to_count
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, RolloutBackend, Sampling
from hpc_rlhf.train.rollout.experience import (
    Experience,
    RewardShaping,
    evaluate_tokens,
    gather_moments,
    make_experience,
    scaled_values,
    whiten,
)
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.ppo.models import PpoModels
from hpc_rlhf.train.stages.ppo.progress import Network, Progress

# Further losses for an optimizer step of the actor, made from its engine; they add to the stats.
Mixture = Callable[[Any, dict[str, Tensor]], list[Callable[[], Tensor]]]


@dataclass(frozen=True)
class Sizes:
    """How much is processed at a time."""

    budget: int  # tokens of a micro-batch
    response: int  # tokens of the longest response
    loss_factor: float  # for a loss that is divided by the global token count; see StageContext


@dataclass(frozen=True)
class Minibatch:
    """A minibatch of an experience."""

    plan: list[list[int]]  # the rows of each micro-batch
    own_tokens: float  # of the responses on this rank
    all_tokens: float  # of the responses on all ranks


@dataclass
class PpoTrainer:
    """The algorithm of ``stages.ppo``.

    Attributes:
        backend: generates responses with the actor.
        rewards: scores them.
        check: called before each micro-batch with the kind of work; it may raise. Collective.
        kl_coef: weight of the KL penalty in the next rollout's rewards.
        estimate: turns rewards into advantages.
    """

    spec: PpoSpec
    models: PpoModels
    backend: RolloutBackend
    rewards: RewardSource
    eos_id: int
    sizes: Sizes
    world: World
    check: Callable[[str], object] = lambda kind: None

    def __post_init__(self) -> None:
        self.kl_coef = self.spec.kl_coef
        self.estimate: AdvantageEstimator = Gae(self.spec.gamma, self.spec.lam)
        self._scores = Moments()
        # Scores from elsewhere are not what the critic starts from.
        self._scales_values = self.spec.normalize_scores and isinstance(self.rewards, ModelReward)
        self._kept: dict[Any, Any] = {}  # outputs of the models with their graphs, to learn from
        self._kept_rollout: Rollout | None = None

    @property
    def state(self) -> dict[str, Any]:
        """What carries over from rollout to rollout, besides the models; JSON."""
        return {"kl_coef": self.kl_coef, "scores": astuple(self._scores), "scales_values": self._scales_values}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.kl_coef, self._scores = state["kl_coef"], Moments(*state["scores"])
        # A critic trained by an earlier version has learned normalized scores.
        self._scales_values = state.get("scales_values", False)

    # Rollout

    def roll_out(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[object, ...]],
        should_stop: Callable[[], bool],
    ) -> Rollout:  # fmt: skip
        """Sample a response to each of this rank's prompts, with the fields of a ``GenerationRequest``. Collective.

        Raises:
            RolloutCancelled: ``should_stop`` returned True.
        """
        sampling = Sampling(self.spec.temperature, self.spec.top_p, self.spec.top_k)
        self.backend.sync_weights(self.models.policy)
        return self.backend.generate(
            GenerationRequest(prompts, self.sizes.response, self.eos_id, sampling, keys, should_stop=should_stop)
        )

    # Evaluation

    def evaluate(self, rollout: Rollout, columns: Mapping[str, Sequence[Any]] | None = None) -> Experience:
        """Scores, log-probabilities, values and advantages of a rollout. Collective.

        Uses the same micro-batches as ``learn``, so that before the first update a token's log-probability
        is the same to the last bit.

        Args:
            columns: further columns of the data, for the reward source.
        """
        spec, models = self.spec, self.models
        models.actor.eval()
        models.critic.eval()
        scores = self._score(rollout, columns or {})
        if spec.normalize_scores:
            own = Moments.of(scores[~scores.isnan()])
            self._scores = Moments.merge([self._scores, *gather_moments(self.world, own)])
        plan = [rows for minibatch in self._plans(rollout, (), 0) for rows in minibatch]
        actor, critic = self._keeping(rollout, plan)
        ref = partial(self._checked, "experience", models.ref)
        stats = evaluate_tokens(rollout, plan, actor, critic, ref, spec.temperature, self.world.device)
        shaping = RewardShaping(
            self.kl_coef, spec.score_clip, spec.missing_eos_penalty,
            self._scores.standardize if spec.normalize_scores else None,
            partial(gather_moments, self.world) if spec.whiten_rewards else None,
        )  # fmt: skip
        experience = make_experience(rollout, stats, scores, shaping, self.estimate, self.eos_id, self._value_scale())
        models.actor.train()
        models.critic.train()
        if spec.kl_target is not None:
            self._adapt_kl_coef(experience, spec.kl_target)
        return whiten(experience, partial(gather_moments, self.world)) if spec.whiten_advantages else experience

    def _score(self, rollout: Rollout, columns: Mapping[str, Sequence[Any]]) -> Tensor:
        """The reward source's scores, NaN where it gives none: (batch,), float32.

        They are computed by minibatch, so that a reward model sees the same micro-batches.
        """
        scores: list[float | None] = []
        for rows in self._minibatch_rows(rollout):
            own = {name: column[rows] for name, column in columns.items()}
            scores += self.rewards.score(rollout.prompts[rows], rollout.responses[rows], own)
        return torch.tensor([torch.nan if score is None else score for score in scores], device=self.world.device)

    def _value_scale(self) -> tuple[float, float]:
        """What the critic's outputs are taken relative to: its offset and its unit.

        The critic starts from the reward model, so it predicts scores as that model gives them. With normalized scores
        its outputs are normalized by the same running moments: what it has learned about the scores stays valid however
        the moments move (Pop-Art, arXiv 1602.07714), and it never has to learn the change of scale first.
        """
        return (self._scores.mean, self._scores.std or 1.0) if self._scales_values else (0.0, 1.0)

    def _adapt_kl_coef(self, experience: Experience, target: float) -> None:
        kl = ppo.k3_kl(experience.log_probs, experience.ref_log_probs, experience.mask).sum().item()
        total = self.world.sums({"kl": kl, "responses": float(len(experience.rollout))})
        self.kl_coef = ppo.adapted_kl_coef(
            self.kl_coef, total["kl"] / total["responses"], target, self.spec.kl_horizon, total["responses"]
        )

    def _keeping(self, rollout: Rollout, plan: list[list[int]]) -> tuple[Any, Any]:
        """Actor and critic for evaluation, perhaps keeping their graphs.

        If the rollout is one micro-batch, the first update starts with exactly the forward passes of the
        evaluation, so they are kept for it. The actor's comes last and needs no memory that learning would not; the
        critic's is held beside it, which is acceptable on a CPU.
        """
        self._kept, self._kept_rollout = {}, rollout
        actor, critic = self.models.actor, self.models.critic
        if len(plan) > 1 or self.spec.dropout:
            return actor, critic
        return self._kept_pass(actor), self._kept_pass(critic) if self.world.device.type == "cpu" else critic

    def _kept_pass(self, model: Any) -> Callable[..., Any]:
        def forward(*inputs: Any) -> Any:
            with torch.enable_grad():
                output = self._kept[model] = model(*inputs)
            return tuple(t.detach() for t in output) if isinstance(output, tuple) else output.detach()

        return forward

    # Minibatches and micro-batches

    def _minibatch_rows(self, rollout: Rollout) -> list[slice]:
        share = len(rollout) // self.spec.minibatches
        return [slice(first, first + share) for first in range(0, len(rollout), share)]

    def _plans(self, rollout: Rollout, key: tuple[object, ...], epoch: int) -> list[list[list[int]]]:
        """The rows of each micro-batch of each minibatch, equally many on all ranks. Collective.

        The first epoch takes the rows as they were sampled, which is in random order.
        """
        minibatches = [list(range(len(rollout)))[rows] for rows in self._minibatch_rows(rollout)]
        if epoch:
            minibatches = exchanged(minibatches, self.world.data_rank, *key, epoch)
        plans = []
        for minibatch in minibatches:
            bins = pack_micro_batches([rollout.lengths[row] for row in minibatch], self.sizes.budget)
            bins = split_to_count(bins, self.world.max(len(bins)))
            plans.append([[minibatch[place] for place in chosen] for chosen in bins])
        return plans

    def _minibatches(self, rollout: Rollout, key: tuple[object, ...], epoch: int) -> list[Minibatch]:
        minibatches = []
        for plan in self._plans(rollout, key, epoch):
            own = float(sum(rollout.response_lengths[row] for rows in plan for row in rows))
            minibatches.append(Minibatch(plan, own, self.world.sums({"tokens": own})["tokens"]))
        return minibatches

    # Learning

    def learn(
        self, experience: Experience | Progress, mixture: Mixture | None = None,
        before: Callable[[Progress], None] = lambda progress: None, key: tuple[object, ...] = (),
    ) -> dict[str, float]:  # fmt: skip
        """All optimizer steps on an experience. Returns ``Progress.sums``. Collective.

        Args:
            experience: or the progress of an earlier attempt, whose remaining steps are then made.
            before: called before each optimizer step with the progress so far.
            key: of the experience; every epoch after the first shuffles its minibatches by it.
        """
        progress = experience if isinstance(experience, Progress) else Progress.begin(experience)
        rollout, stats = progress.experience.rollout, progress.stats
        if rollout is not self._kept_rollout:
            self._kept = {}
        planned, minibatches = -1, []
        while (epoch := progress.cursor.epoch) < self.spec.ppo_epochs:
            if epoch != planned:
                planned, minibatches = epoch, self._minibatches(rollout, key, epoch)
            before(progress.copy())
            network, minibatch = progress.cursor.network, minibatches[progress.cursor.minibatch]
            progress.cursor = progress.cursor.next(len(minibatches))
            if network is Network.ACTOR:
                progress.kl_before = stats["approx_kl"].clone()
                losses = self._losses(self._actor_loss, progress, minibatch)
                losses += mixture(self.models.actor, stats) if mixture else []
                result = self._step(self.models.actor, "the actor's micro-batches", losses)
                progress.count(network, result)
                progress.actor_skipped = not result.applied
                continue
            losses = self._losses(self._critic_loss, progress, minibatch)
            progress.count(network, self._step(self.models.critic, "the critic's micro-batches", losses))
            stats["tokens"] += minibatch.own_tokens
            if self.models.ema and not progress.actor_skipped:
                self.models.ema.update()
            if self._too_far(stats["approx_kl"] - progress.kl_before, minibatch.all_tokens):
                left = self.spec.ppo_epochs * len(minibatches) - progress.cursor.steps(len(minibatches)) // 2
                for engine in (self.models.actor, self.models.critic):
                    engine.lr_scheduler.skip(left)
                break
        return progress.sums()

    def _losses(
        self, loss: Callable[..., Tensor], progress: Progress, minibatch: Minibatch
    ) -> list[Callable[[], Tensor]]:
        scale = self.sizes.loss_factor / minibatch.all_tokens
        return [partial(loss, progress.experience, rows, scale, progress.stats) for rows in minibatch.plan]

    def _step(self, engine: Any, kind: str, losses: list[Callable[[], Tensor]]) -> engines.StepResult:
        """An optimizer step. Collective."""
        return engines.optimizer_step(engine, [partial(self._checked, kind, loss) for loss in losses])

    def _checked(self, kind: str, call: Callable[..., Any], *inputs: Any) -> Any:
        self.check(kind)
        return call(*inputs)

    def _too_far(self, kl: Tensor, tokens: float) -> bool:
        """True if the actor drifted past ``stop_kl`` from the policy that sampled. Collective."""
        limit = self.spec.stop_kl
        return limit is not None and self.world.sums({"kl": kl.item()})["kl"] / tokens > limit

    def _forward(self, model: Any, *inputs: Any) -> Any:
        """A model's forward pass to learn from: the kept one, if any, or a new one."""
        return self._kept.pop(model) if model in self._kept else model(*inputs)

    def _actor_loss(self, experience: Experience, rows: list[int], scale: float, stats: dict[str, Tensor]) -> Tensor:
        """A micro-batch's clipped surrogate loss, times the scale; adds to the stats."""
        batch, response = experience.rollout.batch(rows or [0], self.world.device)
        flat, _ = self._forward(self.models.actor, batch.ids, batch.lengths, response, self.spec.temperature)
        log_probs, (old, advantages, mask) = _padded(
            experience, rows, flat, experience.log_probs, experience.advantages, experience.mask
        )
        loss, clipped, ratio = ppo.policy_loss_sum(log_probs, old, advantages, mask, self.spec.cliprange)
        kl = ppo.k3_kl(old, log_probs.detach(), mask).sum()
        real = bool(rows)  # an empty micro-batch only keeps ranks in sync
        for name, value in {"actor_loss": loss, "clipped": clipped, "ratio": ratio, "approx_kl": kl}.items():
            stats[name] += value.detach() * real
        return loss * (scale * real)

    def _critic_loss(self, experience: Experience, rows: list[int], scale: float, stats: dict[str, Tensor]) -> Tensor:
        """A micro-batch's value loss, times the scale; adds to the stats."""
        batch, response = experience.rollout.batch(rows or [0], self.world.device)
        flat = self._forward(self.models.critic, batch.ids, batch.lengths)[response - 1].float()
        flat = scaled_values(flat, experience.value_scale)
        values, (old, returns, mask) = _padded(
            experience, rows, flat, experience.values, experience.returns, experience.mask
        )
        loss, clipped = ppo.value_loss_sum(values, old, returns, mask, self.spec.cliprange_value)
        real = bool(rows)
        for name, value in {"critic_loss": loss, "value_clipped": clipped}.items():
            stats[name] += value.detach() * real
        return loss * (scale * real)


def _padded(
    experience: Experience, rows: list[int], flat: Tensor, *columns: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Packed numbers of some rows as (rows, response), and the same rows of (batch, response) columns."""
    rows = rows or [0]
    padded = ragged.pad(flat, [experience.rollout.response_lengths[row] for row in rows])
    return padded, tuple(column[rows, : padded.shape[1]] for column in columns)
