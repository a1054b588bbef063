"""The steps of PPO on given prompts: answers, what they are worth, and learning from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.algorithms.moments import Moments
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.ragged import evened, fill
from hpc_rlhf.train.rollout.experience import Experience, Rewarding, Rollout, experience, whiten
from hpc_rlhf.train.rollout.in_process.engine import Sampling
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.ppo.cursor import Progress
from hpc_rlhf.train.stages.ppo.models import PpoModels

# More losses for an optimizer step of the actor, made from its engine.
Mixture = Callable[[Any], list[Callable[[], Tensor]]]


@dataclass(frozen=True)
class Sizes:
    """How much at a time.

    Attributes:
        budget: tokens of a micro-batch.
        answer: tokens of the longest answer.
        rows: answers in the making at a time.
        loss_scale: what a loss divided by the global token count is multiplied with; see StageContext.
    """

    budget: int
    answer: int
    rows: int
    loss_scale: float


class PpoTrainer:
    """What ``stages.ppo`` does in each step.

    Attributes:
        kl_coef: weight of the KL penalty in the next rollout's rewards.
        pause: called before passes over micro-batches with what they are for; it may raise. Collective.
    """

    def __init__(self, spec: PpoSpec, models: PpoModels, tokenizer: Any, sizes: Sizes, world: World) -> None:
        self.spec = spec
        self.models = models
        self.sizes = sizes
        self.world = world
        self.eos_id: int = tokenizer.eos_token_id
        self.kl_coef = spec.kl_coef
        self.pause: Callable[[str], None] = lambda kind: None
        self._scores = Moments()
        self._kept: dict[Any, Any] = {}  # what a model gave in evaluating, to learn from
        self._kept_of: Rollout | None = None

    @property
    def state(self) -> dict[str, Any]:
        """What goes on from rollout to rollout, besides the models."""
        return {"kl_coef": self.kl_coef, "scores": astuple(self._scores)}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.kl_coef, self._scores = state["kl_coef"], Moments(*state["scores"])

    def roll_out(
        self, prompts: list[list[int]], keys: list[tuple[object, ...]], stopped: Callable[[], bool]
    ) -> Rollout:
        """Sample an answer to each of this rank's prompts. Collective.

        Args:
            keys: what seeds each answer.
            stopped: asked between decode steps.

        Raises:
            RolloutDropped: ``stopped`` said so.
        """
        sampling = Sampling(self.spec.temperature, self.spec.top_p, self.spec.top_k)
        sizes = self.sizes
        answers = self.models.rollouts.generate(
            prompts, keys, sizes.answer, sampling, self.eos_id, sizes.rows, stopped
        )
        return Rollout(prompts, answers)

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """Sequences as micro-batches, as many as every other rank has. Collective."""
        bins = fill(lengths, self.sizes.budget)
        return evened(bins, self.world.max(len(bins)))

    def minibatches(self, rollout: Rollout) -> list[list[list[int]]]:
        """The rows of each micro-batch of each minibatch. Collective."""
        share = len(rollout) // self.spec.minibatches
        return [
            [[first + row for row in rows] for rows in self.plan(rollout.lengths[first : first + share])]
            for first in range(0, len(rollout), share)
        ]

    def evaluate(self, rollout: Rollout) -> Experience:
        """Scores, log-probabilities, values and advantages of a rollout. Collective.

        It goes by the same micro-batches as learning, so that before the first update a token's log-probability
        is the same to the last bit.
        """
        spec, models = self.spec, self.models
        rewarding = Rewarding(
            spec.temperature, self.kl_coef, spec.score_clip, spec.missing_eos_penalty, spec.gamma, spec.lam,
            self._standardized if spec.normalize_scores else None,
            self.world.sums if spec.whiten_rewards else None,
        )  # fmt: skip
        models.actor.eval()
        models.critic.eval()
        plan = [rows for minibatch in self.minibatches(rollout) for rows in minibatch]
        made = experience(
            rollout, plan, *self._keeping(rollout, plan),
            partial(self._after_a_pause, "experience", models.ref),
            partial(self._after_a_pause, "scores", models.reward),
            rewarding, self.eos_id, self.world.device,
        )  # fmt: skip
        models.actor.train()
        models.critic.train()
        if spec.kl_target is not None:
            kl = ppo.k3_kl(made.log_probs, made.ref_log_probs, made.mask).sum().item()
            total = self.world.sums({"kl": kl, "answers": float(len(rollout))})
            self.kl_coef = ppo.adapted_kl_coef(
                self.kl_coef,
                total["kl"] / total["answers"],
                spec.kl_target,
                spec.kl_horizon,
                total["answers"],
            )
        return whiten(made, self.world.sums) if spec.whiten_advantages else made

    def _keeping(self, rollout: Rollout, plan: list[list[int]]) -> tuple[Any, Any]:
        """Actor and critic, to evaluate with.

        Where the rollout is one micro-batch, the first update starts with the very passes that are evaluated here.
        They keep what their backward passes need: the actor's, made last, needs no memory that learning would not;
        the critic's stands beside it, which is all right on a CPU.
        """
        self._kept, self._kept_of = {}, rollout
        actor, critic = self.models.actor, self.models.critic
        if len(plan) > 1 or self.spec.dropout:
            return actor, critic
        return self._kept_pass(actor), self._kept_pass(critic) if self.world.device.type == "cpu" else critic

    def _kept_pass(self, model: Any) -> Callable[..., Any]:
        def evaluated(*inputs: Any) -> Any:
            with torch.enable_grad():
                made = self._kept[model] = model(*inputs)
            return tuple(part.detach() for part in made) if isinstance(made, tuple) else made.detach()

        return evaluated

    def _pass(self, model: Any, *inputs: Any) -> Any:
        """A model's pass to learn from: the one that was kept, if any, or a new one."""
        return self._kept.pop(model) if model in self._kept else model(*inputs)

    def _standardized(self, scores: Tensor) -> Tensor:
        """Scores from the mean of all so far, these included, in standard deviations. Collective."""
        for part in self.world.gather_data(Moments.of(scores)):
            self._scores = self._scores.merged(part)
        return self._scores.standardized(scores)

    def learn(
        self, made: Experience | Progress, mixture: Mixture | None = None,
        before: Callable[[Progress], None] = lambda progress: None,
    ) -> dict[str, float]:  # fmt: skip
        """All optimizer steps on a rollout's experience; gives the sums of what happened in them. Collective.

        Args:
            made: or how far an earlier attempt came with one, whose other steps are then made.
            before: called before each optimizer step with how far this has come.
        """
        progress = made if isinstance(made, Progress) else Progress.begin(made)
        if progress.made.rollout is not self._kept_of:
            self._kept = {}
        minibatches = []
        for plan in self.minibatches(progress.made.rollout):
            local = float(sum(len(progress.made.rollout.answers[row]) for rows in plan for row in rows))
            minibatches.append((plan, local, self.world.sums({"tokens": local})["tokens"]))
        sums = progress.sums
        while progress.done < 2 * self.spec.ppo_epochs * len(minibatches):
            before(progress.copy())
            number, critics = divmod(progress.done, 2)
            plan, local, tokens = minibatches[number % len(minibatches)]
            if not critics:
                progress.moved = sums["approx_kl"].clone()
            self._update(bool(critics), progress, plan, self.sizes.loss_scale / tokens, mixture)
            progress.done += 1
            if critics:
                sums["tokens"] += local
                if self.models.ema:
                    self.models.ema.update()
                if self._too_far(sums["approx_kl"] - progress.moved, tokens):
                    break
        return {name: value.item() for name, value in sums.items()}

    def _update(
        self, critics: bool, progress: Progress, plan: list[list[int]], scale: float, mixture: Mixture | None
    ) -> None:
        """An optimizer step of the actor or of the critic on a minibatch. Collective."""
        engine, loss = (
            (self.models.critic, self._critic_loss) if critics else (self.models.actor, self._actor_loss)
        )
        losses: list[Callable[[], Tensor]] = [
            partial(loss, progress.made, rows, scale, progress.sums) for rows in plan
        ]
        if mixture and not critics:
            losses += mixture(engine)
        kind = "the critic's micro-batches" if critics else "the actor's micro-batches"
        engines.optimizer_step(engine, [partial(self._after_a_pause, kind, loss) for loss in losses])

    def _after_a_pause(self, kind: str, passed: Callable[..., Any], *inputs: Any) -> Any:
        self.pause(kind)
        return passed(*inputs)

    def _too_far(self, kl: Tensor, tokens: float) -> bool:
        """Whether the actor had left the one that sampled by more than allowed, as a step began. Collective."""
        limit = self.spec.stop_kl
        return limit is not None and self.world.sums({"kl": kl.item()})["kl"] / tokens > limit

    def _actor_loss(self, made: Experience, rows: list[int], scale: float, sums: dict[str, Tensor]) -> Tensor:
        """A micro-batch's clipped surrogate, times the scale; what happened is added to the sums."""
        chosen, weight = rows or [0], bool(rows)
        batch, answer = made.rollout.batch(chosen, self.world.device)
        flat, _ = self._pass(self.models.actor, batch.ids, batch.lengths, answer, self.spec.temperature)
        log_probs, (old, advantages, mask) = _rows(
            made, chosen, flat, made.log_probs, made.advantages, made.mask
        )
        loss, clipped, ratio = ppo.policy_loss_sum(log_probs, old, advantages, mask, self.spec.cliprange)
        facts = {"actor_loss": loss, "clipped": clipped, "ratio": ratio}
        facts["approx_kl"] = ppo.k3_kl(old, log_probs.detach(), mask).sum()
        for name, value in facts.items():
            sums[name] += value.detach() * weight
        return loss * (scale * weight)

    def _critic_loss(
        self, made: Experience, rows: list[int], scale: float, sums: dict[str, Tensor]
    ) -> Tensor:
        """A micro-batch's value loss, times the scale; what happened is added to the sums."""
        chosen, weight = rows or [0], bool(rows)
        batch, answer = made.rollout.batch(chosen, self.world.device)
        flat = self._pass(self.models.critic, batch.ids, batch.lengths)[answer - 1].float()
        values, (old, returns, mask) = _rows(made, chosen, flat, made.values, made.returns, made.mask)
        loss, clipped = ppo.value_loss_sum(values, old, returns, mask, self.spec.cliprange_value)
        for name, value in (("critic_loss", loss), ("value_clipped", clipped)):
            sums[name] += value.detach() * weight
        return loss * (scale * weight)


def _rows(
    made: Experience, rows: list[int], flat: Tensor, *wholes: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Numbers of some rows' answer tokens as (rows, answer), and the same rows of whole tensors."""
    padded = ragged.pad(flat, [len(made.rollout.answers[row]) for row in rows])
    return padded, tuple(whole[rows, : padded.shape[1]] for whole in wholes)
