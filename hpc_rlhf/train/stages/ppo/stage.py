"""PPO: the actor learns to give answers that the reward model scores higher, without leaving the SFT model far.

Step 3 of DeepSpeed-Chat (arXiv 2308.01320) and InstructGPT (arXiv 2203.02155), with the implementation
details of arXiv 2403.17031.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.sizes import ROWS
from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import sample_at, total_steps
from hpc_rlhf.train.metrics import keep_until
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.interruptible_loading import loading
from hpc_rlhf.train.rollout.experience import Rollout, scores
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine, Sampling
from hpc_rlhf.train.stages.common import commit, new_artifact, write_model
from hpc_rlhf.train.stages.ppo.cursor import Progress
from hpc_rlhf.train.stages.ppo.metrics import summarize
from hpc_rlhf.train.stages.ppo.models import PpoModels, Start
from hpc_rlhf.train.stages.ppo.ptx import PtxStream
from hpc_rlhf.train.stages.ppo.trainer import PpoTrainer, Sizes
from hpc_rlhf.train.stages.sample_log import SampleLog

# Held-out prompts answered at the end by the SFT model and by the trained one.
SHOWN = 16


class PpoStage:
    """One attempt at PPO: its data, its models, its trainer."""

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.stage_spec, PpoSpec)
        self.context = context
        self.spec = context.stage_spec
        self.data = context.data()
        per_rollout = context.batch.global_ * self.spec.minibatches
        self.total = total_steps(len(self.data.train), self.spec.epochs, per_rollout, self.spec.max_steps)
        start = Start(
            actor=str(context.run.stage("sft").model)
            if "sft" in context.spec.needs("ppo")
            else context.start_model(context.spec.models.actor),
            reward=str(context.run.stage("reward").model),
            ds_configs=context.ds_configs,
            longest=context.longest,
            updates=self.total * self.spec.ppo_epochs * self.spec.minibatches,
            seed=context.spec.seed,
            loading=partial(loading, context.stop),
        )
        self.models = PpoModels(self.spec, start, context.tokenizer, context.world)
        sizes = Sizes(
            context.batch.micro * context.longest,
            context.spec.data.max_answer_tokens,
            ROWS,
            context.loss_scale,
        )
        self.trainer = PpoTrainer(self.spec, self.models, context.tokenizer, sizes, context.world)
        self.trainer.pause = context.stop.check
        self.ptx = PtxStream(context, self.spec) if self.spec.ptx is not None else None
        self.samples = SampleLog(context.files.samples, context.tokenizer)

    def roll_out(self, step: int) -> Rollout:
        """Answers to this rank's prompts of a step: an equal share of each minibatch.

        Raises:
            RolloutDropped: this rank was told to stop.
        """
        context, world, seed = self.context, self.context.world, self.context.spec.seed
        share = context.batch.global_ // world.dims.data
        first = step * context.batch.global_ * self.spec.minibatches + world.data_rank * share
        places = [
            first + minibatch * context.batch.global_ + i
            for minibatch in range(self.spec.minibatches)
            for i in range(share)
        ]
        rows = [self.data.train[sample_at(place, len(self.data.train), seed, "ppo")] for place in places]
        keys: list[tuple[object, ...]] = [(seed, "rollout", place) for place in places]
        return self.trainer.roll_out([row["prompt_ids"] for row in rows], keys, context.stop.should_stop)

    def before_each(self, step: int, state: dict[str, Any]) -> Callable[[Progress], None]:
        """What comes before each of a step's optimizer steps: a safe point, and random numbers of its own."""
        context = self.context

        def before(progress: Progress) -> None:
            def take(snapshot: Snapshot) -> None:
                self.models.take(snapshot)
                progress.save(snapshot, context.world.rank)

            context.checkpoints.safe_point(step, take, state, progress.done + 1)
            context.reseed(step, progress.done)

        return before

    def compare(self) -> None:
        """Answer held-out prompts with the SFT model and with the trained one, and keep both. Collective."""
        rows = [self.data.held_out[i] for i in range(min(SHOWN, len(self.data.held_out)))]
        if not rows:
            return
        trainer, world = self.trainer, self.context.world
        prompts = [row["prompt_ids"] for row in rows]
        answers: dict[str, list[tuple[str, float]]] = {}
        for name, engine in (
            ("sft", RolloutEngine(self.models.ref_policy, world)),
            ("ppo", self.models.rollouts),
        ):
            made: list[list[int]] = []
            with self.context.stop.cancellable():
                made = engine.generate(
                    prompts,
                    None,
                    trainer.sizes.answer,
                    Sampling(greedy=True),
                    trainer.eos_id,
                    ROWS,
                    self.context.stop.should_stop,
                )
            rollout = Rollout(prompts, made)
            found = scores(self.models.reward, rollout, trainer.plan(rollout.lengths), world.device).tolist()
            texts = [self.samples.texts(rollout, i)[1] for i in range(len(rows))]
            answers[name] = [(text, round(score, 4)) for text, score in zip(texts, found, strict=True)]
        if world.is_main:
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
        context, models = self.context, self.models
        folder = new_artifact(context)
        with context.stop.cancellable():
            write_model(context, models.policy, folder)
            if models.ema:
                with models.ema.swapped_in():  # a stop saves the weights as they were before
                    write_model(context, models.policy, folder / context.files.ema_model.name)
        commit(context, folder, self.total, metrics)


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
    world, total, take = context.world, stage.total, stage.models.take

    # 2. Resume, perhaps between the optimizer steps on an experience.
    found = context.resume(stage.models.load)
    first = found.step if found else 0
    state: dict[str, Any] = dict(found.state) if found else {"trainer": stage.trainer.state}
    stage.trainer.state = state["trainer"]
    begun: Progress | None = None
    if found and found.part:
        begun = Progress.load(found.folder, world.rank, found.part - 1, world.device)
    if world.is_main:
        keep_until(context.files.samples, first if found else -1)

    for step in range(first, total):
        if begun is None:
            # 3. A safe point; then answers to the step's prompts. A signal ends the attempt here or below; the
            # next one makes the same rollout again.
            context.checkpoints.safe_point(step, take, state)
            context.reseed(step)
            before = {"kl_coef": stage.trainer.kl_coef, "actor_lr": engines.learning_rate(stage.models.actor)}
            rollout = Rollout([], [])
            with context.stop.cancellable():
                rollout = stage.roll_out(step)

            # 4. What the answers are worth, token by token.
            begun = Progress.begin(stage.trainer.evaluate(rollout))
            state = {**state, "trainer": stage.trainer.state, "before": before}

        # 5. The optimizer steps, with the pretraining mixture and the moving average. Before each is a safe point,
        # which keeps the experience.
        made = begun.made
        learnt = stage.trainer.learn(
            begun, stage.ptx.losses if stage.ptx else None, stage.before_each(step, state)
        )
        begun = None

        # 6. Metrics and samples.
        values = {**summarize(made, learnt, stage.trainer.eos_id, world.sums), **state.pop("before")}
        values.update(engines.traffic([stage.models.actor, stage.models.critic]))
        context.metrics.log(step + 1, total, "train", values)
        if step == 0:
            state.update(
                reward_first=values["reward"], reward_first_std=values["reward_std"], kl_first=values["kl"]
            )
        state.update(reward_last=values["reward"], kl_last=values["kl"])
        if world.is_main:
            stage.samples.keep_rollouts(step + 1, made)
    context.checkpoints.safe_point(total, take, state)

    # 7. Answers side by side, and the models.
    stage.compare()
    stage.hand_over({name: value for name, value in state.items() if name not in ("seconds", "trainer")})
