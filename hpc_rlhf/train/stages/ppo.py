"""PPO: the actor learns to give answers that the reward model scores higher, without leaving the SFT model far.

Step 3 of DeepSpeed-Chat (arXiv 2308.01320) and InstructGPT (arXiv 2203.02155), with the implementation
details of arXiv 2403.17031.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.algorithms import ppo
from hpc_rlhf.train.algorithms.logprobs import token_log_probs
from hpc_rlhf.train.checkpoint import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import micro_batches, sample_at, total_steps
from hpc_rlhf.train.data.tokenized import pad_left
from hpc_rlhf.train.metrics import keep_until
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.ema import Ema
from hpc_rlhf.train.models.load import check_fits, load_causal, load_reward
from hpc_rlhf.train.models.weights import export
from hpc_rlhf.train.rollout.engine import RolloutDropped, RolloutEngine, Sampling, decode
from hpc_rlhf.train.rollout.experience import (
    Experience,
    Rewarding,
    Rollout,
    answer_logits,
    answer_scores,
    answer_values,
    experience,
    whiten,
)
from hpc_rlhf.train.rollout.sampling import uniforms
from hpc_rlhf.train.rollout.summary import summarize
from hpc_rlhf.train.stages.common import adapted, commit, load_engines, save_engines
from hpc_rlhf.train.stages.ptx import PtxStream
from hpc_rlhf.train.stages.samples import SampleLog

# Held-out prompts answered at the end by the SFT model and by the trained one.
SHOWN = 16


class PpoStage:
    """The models of PPO and the steps of its loop."""

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.stage_spec, PpoSpec)
        self.context = context
        self.spec = context.stage_spec
        self.device = context.world.device
        self.pad_id: int = context.tokenizer.pad_token_id
        self.eos_id: int = context.tokenizer.eos_token_id
        self.sampling = Sampling(self.spec.temperature, self.spec.top_p, self.spec.top_k)
        self.data = context.data()
        self.count = len(self.data.train)
        per_rollout = context.per_step * self.spec.minibatches
        self.total = total_steps(self.count, self.spec.epochs, per_rollout, self.spec.max_steps)
        self.samples = SampleLog(context.files.samples, context.tokenizer)
        self._load_models()

    def _load_models(self) -> None:
        """Actor and reference from the SFT model, critic and reward model from the reward model."""
        context, spec, config = self.context, self.spec, self.context.ds_config
        needs = context.spec.needs("ppo")
        actor_source = (
            str(context.run.stage("sft").model)
            if "sft" in needs
            else context.start_model(context.spec.models.actor)
        )
        reward_source = str(context.run.stage("reward").model)
        with engines.sharded_loading(config):
            self.actor = load_causal(actor_source, context.dtype, spec.dropout)
            critic = load_reward(reward_source, context.dtype, None, spec.dropout)
            ref = load_causal(actor_source, context.dtype)
            reward = load_reward(reward_source, context.dtype, None)
        check_fits(self.actor.config, context.tokenizer, context.longest, actor_source)
        check_fits(critic.classifier.config, context.tokenizer, context.longest, reward_source)
        adapted(self.actor, spec, context.spec.seed)
        if spec.activation_checkpointing:
            critic.classifier.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        updates = self.total * spec.ppo_epochs * spec.minibatches
        self.actor_engine = engines.training_engine(self.actor, config, spec, spec.actor_lr, updates)
        self.critic_engine = engines.training_engine(critic, config, spec, spec.critic_lr, updates)
        self.ref_model = ref
        self.ref = engines.frozen_engine(ref, config, self.device)
        self.reward = engines.frozen_engine(reward, config, self.device)
        self.rollouts = RolloutEngine(self.actor, context.world)
        rank, size = context.world.rank, context.world.size
        self.ema = Ema(self.actor, spec.ema_beta, rank, size) if spec.ema else None
        self.ptx = PtxStream(context, spec) if spec.ptx is not None else None

    # Checkpoints

    def write(self, folder: Path) -> None:
        save_engines(folder, {"actor": self.actor_engine, "critic": self.critic_engine})
        if self.ema:
            self.ema.save(folder)

    def load(self, found: Checkpoint) -> None:
        load_engines({"actor": self.actor_engine, "critic": self.critic_engine})(found)
        if self.ema:
            self.ema.load(found.folder)

    # The numbered steps

    def roll_out(self, step: int) -> list[Rollout]:
        """Sample an answer to each of this rank's prompts of a step, in micro-batches.

        Raises:
            RolloutDropped: this rank was told to stop.
        """
        world, seed = self.context.world, self.context.spec.seed
        blocks = micro_batches(
            step,
            self.context.micro,
            self.context.accumulation * self.spec.minibatches,
            world.rank,
            world.size,
        )
        made = []
        with self.rollouts.ready() as model:
            for block in blocks:
                rows = [self.data.train[sample_at(p, self.count, seed, "ppo")] for p in block]
                ids, mask = pad_left([row["prompt_ids"] for row in rows], self.pad_id)
                ids, mask = ids.to(self.device), mask.to(self.device)
                limit = self.context.spec.data.max_answer_tokens
                drawn = uniforms([(seed, "rollout", position) for position in block], limit)
                answers, answer_mask = decode(
                    model, ids, mask, limit, self.sampling, drawn, self.eos_id, self.pad_id,
                    going=self.rollouts.going, stopped=lambda: self.rollouts.stopped(self.context.stop.code),
                )  # fmt: skip
                made.append(Rollout.join(ids, mask, answers, answer_mask))
        return made

    def evaluate(self, rollouts: list[Rollout]) -> list[Experience]:
        """Scores, log-probabilities, values and advantages of rollouts."""
        spec = self.spec
        rewarding = Rewarding(
            spec.temperature, spec.kl_coef, spec.score_clip, spec.missing_eos_penalty, spec.gamma, spec.lam
        )
        self.actor_engine.eval()
        self.critic_engine.eval()
        made = [
            experience(
                r, self.actor_engine, self.critic_engine, self.ref, self.reward, rewarding, self.eos_id
            )
            for r in rollouts
        ]
        self.actor_engine.train()
        self.critic_engine.train()
        return whiten(made, self.context.world.sums) if spec.whiten_advantages else made

    def learn(self, batches: list[Experience]) -> dict[str, float]:
        """All optimizer steps on a rollout's experience; gives the sums of what happened in them."""
        sums = dict.fromkeys(
            ("actor_loss", "critic_loss", "ratio", "clipped", "value_clipped", "tokens"), 0.0
        )
        accumulation = self.context.accumulation
        for _ in range(self.spec.ppo_epochs):
            for first in range(0, len(batches), accumulation):
                minibatch = batches[first : first + accumulation]
                local = float(sum(batch.rollout.answer_mask.sum().item() for batch in minibatch))
                tokens = self.context.world.sums({"tokens": local})["tokens"]
                scale = self.context.loss_scale / tokens
                actor_losses: list[Callable[[], Tensor]] = [
                    partial(self.actor_loss, batch, scale, sums) for batch in minibatch
                ]
                if self.ptx is not None:
                    actor_losses += self.ptx.losses(self.actor_engine)
                engines.optimizer_step(self.actor_engine, actor_losses)
                engines.optimizer_step(
                    self.critic_engine, [partial(self.critic_loss, batch, scale, sums) for batch in minibatch]
                )
                sums["tokens"] += local
                if self.ema:
                    self.ema.update()
        return sums

    def actor_loss(self, batch: Experience, scale: float, sums: dict[str, float]) -> Tensor:
        """A micro-batch's clipped surrogate, times the scale; what happened is added to the sums."""
        rollout = batch.rollout
        logits = answer_logits(self.actor_engine, rollout)
        log_probs = token_log_probs(logits, rollout.answers, self.spec.temperature)
        loss, clipped, ratio = ppo.policy_loss_sum(
            log_probs, batch.log_probs, batch.advantages, rollout.answer_mask, self.spec.cliprange
        )
        sums["actor_loss"] += loss.item()
        sums["clipped"] += clipped.item()
        sums["ratio"] += ratio.item()
        return loss * scale

    def critic_loss(self, batch: Experience, scale: float, sums: dict[str, float]) -> Tensor:
        """A micro-batch's value loss, times the scale; what happened is added to the sums."""
        values = answer_values(self.critic_engine, batch.rollout)
        loss, clipped = ppo.value_loss_sum(
            values, batch.values, batch.returns, batch.rollout.answer_mask, self.spec.cliprange_value
        )
        sums["critic_loss"] += loss.item()
        sums["value_clipped"] += clipped.item()
        return loss * scale

    def compare(self) -> None:
        """Answer held-out prompts with the SFT model and with the trained one, and keep both. Collective."""
        rows = [self.data.held_out[i] for i in range(min(SHOWN, len(self.data.held_out)))]
        if not rows:
            return
        ids, mask = pad_left([row["prompt_ids"] for row in rows], self.pad_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        limit = self.context.spec.data.max_answer_tokens
        answers: dict[str, list[tuple[str, float]]] = {}
        for name, engine in (
            ("sft", RolloutEngine(self.ref_model, self.context.world)),
            ("ppo", self.rollouts),
        ):
            with engine.ready() as model:
                made = decode(
                    model, ids, mask, limit, Sampling(greedy=True), None, self.eos_id, self.pad_id,
                    going=engine.going,
                )  # fmt: skip
            rollout = Rollout.join(ids, mask, *made)
            scores = answer_scores(self.reward, rollout).tolist()
            answers[name] = [
                (self.samples.texts(rollout, i)[1], round(scores[i], 4)) for i in range(len(rows))
            ]
        if self.context.world.is_main:
            self.samples.keep(
                [
                    {
                        "step": self.total, "kind": "final", "prompt": row["prompt"],
                        "answer": tuned[0], "reward": tuned[1], "sft_answer": sft[0], "sft_reward": sft[1],
                    }
                    for row, tuned, sft in zip(rows, answers["ppo"], answers["sft"], strict=True)
                ]
            )  # fmt: skip

    def hand_over(self, metrics: dict[str, Any]) -> None:
        """Write the actor, and its moving average beside it. Collective."""
        context = self.context
        partial = context.files.model.with_name(f"model-{context.attempt}")
        export(self.actor, context.tokenizer, partial, context.world.is_main)
        if self.ema:
            with self.ema.swapped_in():
                export(
                    self.actor,
                    context.tokenizer,
                    partial / context.files.ema_model.name,
                    context.world.is_main,
                )
        commit(context, partial, self.total, metrics)


def _check_same_tokenizer(context: StageContext) -> None:
    """The reward model must have been trained on the actor's tokens."""
    for need in context.spec.needs("ppo"):
        from transformers import AutoTokenizer

        other = AutoTokenizer.from_pretrained(str(context.run.stage(need).model))
        # transformers may add a token of its own as it loads a folder (Qwen2's does).
        if not context.tokenizer.get_vocab().items() <= other.get_vocab().items():
            raise HpcRlhfError(
                f"the tokenizer of stage {need} differs from the actor's",
                where=f"stage {context.stage}",
                hint="use models that share a tokenizer",
            )


def run(context: StageContext) -> None:
    # 1. Data and models.
    _check_same_tokenizer(context)
    stage = PpoStage(context)
    world, total = context.world, stage.total

    # 2. Resume.
    found = context.resume(stage.load)
    first = found.step if found else 0
    state: dict[str, Any] = dict(found.state) if found else {}
    if world.is_main:
        keep_until(context.files.samples, first if found else -1)

    for step in range(first, total):
        # 3. A safe point; then answers to the step's prompts.
        context.safe_point(step, stage.write, state)
        context.reseed(step)
        rollouts: list[Rollout] = []
        with suppress(RolloutDropped):
            rollouts = stage.roll_out(step)
        # A signal in mid-rollout ends the attempt here; the next one makes the same rollout again.
        if context.stop_agreed():
            context.safe_point(step, stage.write, state)

        # 4. What the answers are worth, token by token.
        batches = stage.evaluate(rollouts)

        # 5. The optimizer steps, with the pretraining mixture and the moving average.
        rate = engines.learning_rate(stage.actor_engine)
        learnt = stage.learn(batches)

        # 6. Metrics and samples.
        values = summarize(batches, learnt, stage.eos_id, world.sums)
        context.metrics.log(step + 1, total, "train", {**values, "actor_lr": rate})
        if step == 0:
            state.update(
                reward_first=values["reward"], reward_first_std=values["reward_std"], kl_first=values["kl"]
            )
        state.update(reward_last=values["reward"], kl_last=values["kl"])
        if world.is_main:
            stage.samples.keep_rollouts(step + 1, batches[0])
    context.safe_point(total, stage.write, state)

    # 7. Answers side by side, and the models.
    stage.compare()
    state.pop("seconds", None)
    stage.hand_over(state)
