"""PPO and GRPO in your own program, under DeepSpeed-Chat's names; the steps are those of the stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import PlannedJob
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.spec.batch import Batch
from hpc_rlhf.spec.stages import GRPO, PPO, GrpoSpec, PpoSpec, StageKind
from hpc_rlhf.train.data.dialogues import configure_tokenizer, token_ids
from hpc_rlhf.train.data.rows import parse_prompt
from hpc_rlhf.train.data.templates import prompt_text
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.models.tokenizers import check_same_tokenizer, load_tokenizer
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rollout.backend import RolloutBackend
from hpc_rlhf.train.rollout.experience import Experience, GroupExperience
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.runtime import world as worlds
from hpc_rlhf.train.runtime.launcher import launcher_ranks
from hpc_rlhf.train.stages.grpo.metrics import compare
from hpc_rlhf.train.stages.grpo.metrics import summarize as summarize_groups
from hpc_rlhf.train.stages.grpo.models import GrpoModels
from hpc_rlhf.train.stages.grpo.trainer import GrpoTrainer
from hpc_rlhf.train.stages.policy.minibatches import Sizes
from hpc_rlhf.train.stages.policy.models import ModelSources, PolicyModels
from hpc_rlhf.train.stages.policy.progress import E
from hpc_rlhf.train.stages.policy.trainer import PolicyTrainer
from hpc_rlhf.train.stages.ppo.metrics import summarize
from hpc_rlhf.train.stages.ppo.models import PpoModels
from hpc_rlhf.train.stages.ppo.trainer import PpoTrainer

# Fields of a stage for its duration, checkpoints and placement, which here are up to the program.
JOB_ONLY = (
    "epochs", "max_steps", "global_batch", "checkpoint_every", "mttf", "keep_checkpoints", "slurm", "ptx", "ptx_coef",
    "eval_every", "keep_best", "rewards", "dynamic_sampling",
)  # fmt: skip


def _settings(kind: StageKind, args: Mapping[str, object]) -> Any:
    for field in JOB_ONLY:
        if field in args:
            raise HpcRlhfError(
                f"{field} is for the {kind.name} stage of a job; in a program it is up to the program", where="args"
            )
    try:
        spec = kind.spec.model_validate(dict(args))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'args'}: {e['msg']}" for e in error.errors()]
        hint = f"the fields are those of stages.{kind.name}"
        raise HpcRlhfError("; ".join(wrong), where="args", hint=hint) from error
    if refusals := {field: what for field, what in spec.refusals().items() if field not in JOB_ONLY}:
        raise HpcRlhfError("; ".join(f"{field} {what}" for field, what in refusals.items()), where="args")
    return spec


class _Engine:
    """What the engines of PPO and GRPO have in common."""

    models: PolicyModels

    def __init__(
        self, kind: StageKind, args: Mapping[str, object] | None, actor: str, tokenizer: object,
        max_prompt_tokens: int, max_answer_tokens: int, seed: int,
    ) -> None:  # fmt: skip
        self.spec = _settings(kind, args or {})
        self.max_prompt_tokens, self.max_answer_tokens, self.seed = max_prompt_tokens, max_answer_tokens, seed
        self.world = worlds.join(launcher_ranks()[1]).laid_out(self.spec.tensor_parallel, self.spec.sequence_parallel)
        self._kind, self._actor = kind, actor
        self._source = tokenizer if isinstance(tokenizer, str) else None if tokenizer else actor
        if self._source is not None:
            tokenizer = load_tokenizer(self._source, iter(()), Path(self._source), self.world)
        self.tokenizer: Any = tokenizer

    def _sources(self, reward: str | None, num_total_iters: int) -> ModelSources:
        self.tokenizer = configure_tokenizer(self.tokenizer, "auto")
        ranks, spec, name = self.world.dims.data, self.spec, self._kind.name
        batch = Batch(spec.micro_batch, 1, ranks, spec.micro_batch * ranks)
        job = PlannedJob(name, name, (), spec, spec.slurm, batch)
        return ModelSources(
            actor=self._actor,
            reward=reward,
            ds_configs={model: json.loads(text) for model, text in Templates().ds_configs(job).items()},
            longest=self.max_prompt_tokens + self.max_answer_tokens,
            updates=num_total_iters,
            seed=self.seed,
        )

    @property
    def sizes(self) -> Sizes:
        budget = self.spec.micro_batch * (self.max_prompt_tokens + self.max_answer_tokens)
        return Sizes(budget, self.max_answer_tokens, float(self.world.dims.data))

    def save_pretrained(self, folder: str) -> None:
        """Write the actor as a Hugging Face folder, and its moving average to ``ema`` in it. Collective."""
        target, models = Path(folder), self.models
        export(models.policy, self.tokenizer, target, self.world.is_main)
        if models.ema:
            with models.ema.averaged_weights():
                export(models.policy, self.tokenizer, target / "ema", self.world.is_main)
        self.world.barrier()


class DeepSpeedRLHFEngine(_Engine):
    """The four models of PPO, as DeepSpeed engines on this rank.

    Start the program on every rank with ``deepspeed``, ``torchrun`` or ``srun``; started alone, it is the only rank.

    Args:
        actor_model_name_or_path: the fine-tuned model: initializes the actor and is the reference.
        critic_model_name_or_path: a trained reward model: initializes the critic and scores the responses.
        tokenizer: the tokenizer of both, or where to load it from; by default the actor's.
        num_total_iters: optimizer steps of the learning-rate schedule.
        args: fields of ``stages.ppo``, such as ``{"actor_lr": 1e-6, "zero": 3}``.
        max_prompt_tokens, max_answer_tokens: lengths of the longest prompt and response.
        seed: for sampling.

    Attributes:
        models: the engines ``actor``, ``critic``, ``ref`` and ``reward``.

    Raises:
        HpcRlhfError: a setting is wrong, or a model cannot be loaded.
    """

    spec: PpoSpec
    models: PpoModels

    def __init__(
        self, actor_model_name_or_path: str, critic_model_name_or_path: str, tokenizer: object = None,
        num_total_iters: int = 1000, args: Mapping[str, object] | None = None, *,
        max_prompt_tokens: int = 256, max_answer_tokens: int = 256, seed: int = 1234,
    ) -> None:  # fmt: skip
        lengths = max_prompt_tokens, max_answer_tokens
        super().__init__(PPO, args, actor_model_name_or_path, tokenizer, *lengths, seed)
        check_same_tokenizer(self.tokenizer, self._source, critic_model_name_or_path)
        start = self._sources(critic_model_name_or_path, num_total_iters)
        self.models = PpoModels(self.spec, start, self.tokenizer, self.world)


class DeepSpeedGRPOEngine(_Engine):
    """The models of GRPO, as DeepSpeed engines on this rank; see ``DeepSpeedRLHFEngine``.

    Args:
        actor_model_name_or_path: initializes the actor, and is the reference if kl_coef is above 0.
        args: fields of ``stages.grpo``, such as ``{"lr": 1e-6, "group_size": 16}``.

    Attributes:
        models: the engine ``actor``, and ``ref`` if there is a reference.

    Raises:
        HpcRlhfError: a setting is wrong, or the model cannot be loaded.
    """

    spec: GrpoSpec
    models: GrpoModels

    def __init__(
        self, actor_model_name_or_path: str, tokenizer: object = None, num_total_iters: int = 1000,
        args: Mapping[str, object] | None = None, *,
        max_prompt_tokens: int = 256, max_answer_tokens: int = 256, seed: int = 1234,
    ) -> None:  # fmt: skip
        lengths = max_prompt_tokens, max_answer_tokens
        super().__init__(GRPO, args, actor_model_name_or_path, tokenizer, *lengths, seed)
        self.models = GrpoModels(self.spec, self._sources(None, num_total_iters), self.tokenizer, self.world)


class _Trainer(Generic[E]):
    """What the trainers of PPO and GRPO have in common."""

    def __init__(
        self, algorithm: type[PolicyTrainer[E]], engine: _Engine, rewards: RewardSource, backend: RolloutBackend | None,
        group_size: int = 1,
    ) -> None:  # fmt: skip
        self.engine, self._group_size, world = engine, group_size, engine.world
        self._trainer = algorithm(
            engine.spec,
            engine.models,
            RolloutEngine(engine.models.policy, world) if backend is None else backend,
            rewards,
            engine.tokenizer.eos_token_id,
            engine.sizes,
            world,
        )
        self._batches, self._learned = 0, 0
        self.metrics: dict[str, float | None] = {}

    def generate_experience(
        self, prompt_batch: Sequence[str | Sequence[int]], columns: Mapping[str, Sequence[object]] | None = None
    ) -> E:
        """Sample a response to each prompt, with GRPO group_size responses, and evaluate them. Collective.

        Args:
            prompt_batch: this rank's prompts, as many as on every other rank: questions, transcripts that end
                with ``Assistant:``, or token ids. A prompt longer than max_prompt_tokens is truncated on the
                left. Under tensor_parallel and sequence_parallel, the ranks of a group pass the same
                prompts.
            columns: data for the reward source by name, with an entry per prompt, such as reference answers.

        Raises:
            HpcRlhfError: the number of responses is not a multiple of minibatches or differs between ranks, or
                ranks of a group have different prompts.
        """
        engine, times = self.engine, self._group_size
        prompts = self._repeated_prompts(prompt_batch)
        keys: list[tuple[object, ...]] = [
            (engine.seed, "rollout", self._batches, engine.world.data_rank, row) for row in range(len(prompts))
        ]
        repeated = {name: [cell for cell in column for _ in range(times)] for name, column in (columns or {}).items()}
        experience = self._trainer.evaluate(self._trainer.roll_out(prompts, keys, lambda: False, times), repeated)
        self._batches += 1
        return experience

    def _repeated_prompts(self, prompt_batch: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """The token ids of each response's prompt. Collective.

        Raises:
            HpcRlhfError: as ``generate_experience``.
        """
        world, minibatches, times = self.engine.world, self.engine.spec.minibatches, self._group_size
        prompts = [ids for prompt in prompt_batch for ids in [_prompt_ids(self.engine, prompt)] * times]
        counts = set(world.gather(len(prompts)))
        if len(counts) > 1 or not prompts or len(prompts) % minibatches:
            count = f"{' and '.join(map(str, sorted(counts)))} {'prompts' if times == 1 else 'responses'}"
            raise HpcRlhfError(
                f"{count} cannot be divided into equal minibatches on every rank",
                where="prompt_batch",
                hint=f"pass the same multiple of minibatches ({minibatches}) on every rank",
            )
        if any(other != prompts for other in world.gather_sharers(prompts)):
            raise HpcRlhfError(
                "ranks that work on the same samples have different prompts",
                where="prompt_batch",
                hint=f"give each {world.size // world.dims.data} neighbouring ranks, a group of tensor_parallel x "
                "sequence_parallel, the same",
            )
        return prompts

    def _learn(self, experience: E) -> dict[str, float]:
        """The optimizer steps on an experience. Returns ``Progress.sums``. Collective."""
        stats = self._trainer.learn(experience, key=(self.engine.seed, "minibatches", self._learned))
        self._learned += 1
        return stats


def _prompt_ids(engine: _Engine, prompt: str | Sequence[int]) -> list[int]:
    ids = prompt
    if isinstance(prompt, str):
        (ids,) = token_ids(engine.tokenizer, [prompt_text(engine.tokenizer, *parse_prompt(prompt))])
    return [int(token) for token in ids][-engine.max_prompt_tokens :]


class DeepSpeedPPOTrainer(_Trainer[Experience]):
    """PPO's steps: responses to a batch of prompts, and learning from them.

    Args:
        rewards: scores the responses; by default the engine's reward model.
        backend: generates the responses; by default the training processes themselves.

    Attributes:
        metrics: of the last step: reward, kl, entropy, clipfrac and the others of a ppo stage's metrics.jsonl.
    """

    def __init__(
        self, engine: DeepSpeedRLHFEngine, rewards: RewardSource | None = None, backend: RolloutBackend | None = None
    ) -> None:
        own = ModelReward(engine.models.reward, engine.world, engine.sizes.budget)
        super().__init__(PpoTrainer, engine, own if rewards is None else rewards, backend)

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """The optimizer steps on an experience; returns the losses of actor and critic. Collective."""
        engine, stats = self.engine, self._learn(experience)
        self.metrics = metrics = summarize(experience, stats, engine.spec, engine.tokenizer.eos_token_id, engine.world)
        actor_loss, critic_loss = metrics["actor_loss"], metrics["critic_loss"]
        assert actor_loss is not None
        assert critic_loss is not None
        return actor_loss, critic_loss


class DeepSpeedGRPOTrainer(_Trainer[GroupExperience]):
    """GRPO's steps: group_size responses to each of a batch of prompts, and learning from them.

    Args:
        rewards: scores the responses.
        backend: generates the responses; by default the training processes themselves.

    Attributes:
        metrics: of the last step: reward, kl, entropy, clipfrac and the others of a grpo stage's metrics.jsonl.
    """

    _trainer: GrpoTrainer

    def __init__(
        self, engine: DeepSpeedGRPOEngine, rewards: RewardSource, backend: RolloutBackend | None = None
    ) -> None:
        super().__init__(GrpoTrainer, engine, rewards, backend, engine.spec.group_size)

    def train_rlhf(self, experience: GroupExperience) -> float:
        """The optimizer steps on an experience; returns the loss. Collective."""
        engine, stats = self.engine, self._learn(experience)
        metrics = summarize_groups(experience, stats, engine.spec, engine.tokenizer.eos_token_id, engine.world)
        groups = self._trainer.groups(experience.rollout)
        self.metrics = {**compare(experience.scores, groups, engine.world), **metrics}
        loss = metrics["loss"]
        assert loss is not None
        return loss
