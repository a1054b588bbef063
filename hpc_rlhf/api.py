"""PPO in your own program, under DeepSpeed-Chat's names; the steps are those of the ppo stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import PlannedJob
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.spec.batch import Batch
from hpc_rlhf.spec.stages import PPO, PpoSpec
from hpc_rlhf.train.data.dialogues import configure_tokenizer, token_ids
from hpc_rlhf.train.data.rows import parse_prompt
from hpc_rlhf.train.data.templates import prompt_text
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.models.tokenizers import check_same_tokenizer, load_tokenizer
from hpc_rlhf.train.rewards.model import ModelReward
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rollout.backend import RolloutBackend
from hpc_rlhf.train.rollout.experience import Experience
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.runtime import world as worlds
from hpc_rlhf.train.runtime.launcher import launcher_ranks
from hpc_rlhf.train.stages.policy.models import ModelSources
from hpc_rlhf.train.stages.policy.trainer import Sizes
from hpc_rlhf.train.stages.ppo.metrics import summarize
from hpc_rlhf.train.stages.ppo.models import PpoModels
from hpc_rlhf.train.stages.ppo.trainer import PpoTrainer

# Fields of a ppo stage for its duration, checkpoints and placement, which here are up to the program.
JOB_ONLY = (
    "epochs", "max_steps", "global_batch", "checkpoint_every", "mttf", "keep_checkpoints", "slurm", "ptx", "ptx_coef",
    "eval_every", "keep_best", "rewards",
)  # fmt: skip


def _settings(args: Mapping[str, object]) -> PpoSpec:
    for field in JOB_ONLY:
        if field in args:
            raise HpcRlhfError(
                f"{field} is for the ppo stage of a job; in a program it is up to the program", where="args"
            )
    try:
        spec = PpoSpec.model_validate(dict(args))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'args'}: {e['msg']}" for e in error.errors()]
        raise HpcRlhfError("; ".join(wrong), where="args", hint="the fields are those of stages.ppo") from error
    if refusals := spec.refusals():
        raise HpcRlhfError("; ".join(f"{field} {what}" for field, what in refusals.items()), where="args")
    return spec


class DeepSpeedRLHFEngine:
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

    def __init__(
        self, actor_model_name_or_path: str, critic_model_name_or_path: str, tokenizer: object = None,
        num_total_iters: int = 1000, args: Mapping[str, object] | None = None, *,
        max_prompt_tokens: int = 256, max_answer_tokens: int = 256, seed: int = 1234,
    ) -> None:  # fmt: skip
        self.spec = _settings(args or {})
        self.max_prompt_tokens, self.max_answer_tokens, self.seed = max_prompt_tokens, max_answer_tokens, seed
        self.world = worlds.join(launcher_ranks()[1]).with_tensor_parallel(self.spec.tensor_parallel)
        source = tokenizer if isinstance(tokenizer, str) else None if tokenizer else actor_model_name_or_path
        if source is not None:
            tokenizer = load_tokenizer(source, iter(()), Path(source), self.world)
        check_same_tokenizer(tokenizer, source, critic_model_name_or_path)
        self.tokenizer = configure_tokenizer(tokenizer, "auto")
        batch = Batch(self.spec.micro_batch, 1, self.world.dims.data, self.spec.micro_batch * self.world.dims.data)
        job = PlannedJob(PPO.name, PPO.name, (), self.spec, self.spec.slurm, batch)
        start = ModelSources(
            actor=actor_model_name_or_path,
            reward=critic_model_name_or_path,
            ds_configs={model: json.loads(text) for model, text in Templates().ds_configs(job).items()},
            longest=max_prompt_tokens + max_answer_tokens,
            updates=num_total_iters,
            seed=seed,
        )
        self.models = PpoModels(self.spec, start, self.tokenizer, self.world)

    def save_pretrained(self, folder: str) -> None:
        """Write the actor as a Hugging Face folder, and its moving average to ``ema`` in it. Collective."""
        target, models = Path(folder), self.models
        export(models.policy, self.tokenizer, target, self.world.is_main)
        if models.ema:
            with models.ema.averaged_weights():
                export(models.policy, self.tokenizer, target / "ema", self.world.is_main)
        self.world.barrier()


class DeepSpeedPPOTrainer:
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
        self.engine = engine
        world, longest = engine.world, engine.max_prompt_tokens + engine.max_answer_tokens
        budget = engine.spec.micro_batch * longest
        self._trainer = PpoTrainer(
            engine.spec,
            engine.models,
            RolloutEngine(engine.models.policy, world) if backend is None else backend,
            ModelReward(engine.models.reward, world, budget) if rewards is None else rewards,
            engine.tokenizer.eos_token_id,
            Sizes(budget, engine.max_answer_tokens, float(world.dims.data)),
            world,
        )
        self._batches, self._learned = 0, 0
        self.metrics: dict[str, float | None] = {}

    def generate_experience(
        self, prompt_batch: Sequence[str | Sequence[int]], columns: Mapping[str, Sequence[object]] | None = None
    ) -> Experience:
        """Sample a response to each prompt, and evaluate it. Collective.

        Args:
            prompt_batch: this rank's prompts, as many as on every other rank: questions, transcripts that end
                with ``Assistant:``, or token ids. A prompt longer than max_prompt_tokens is truncated on the
                left. Under tensor_parallel, the ranks of a group pass the same prompts.
            columns: data for the reward source by name, with an entry per prompt, such as reference answers.

        Raises:
            HpcRlhfError: the number of prompts is not a multiple of minibatches or differs between ranks, or
                ranks that share layers have different prompts.
        """
        engine, world = self.engine, self.engine.world
        prompts = [self._prompt_ids(prompt) for prompt in prompt_batch]
        counts = set(world.gather(len(prompts)))
        if len(counts) > 1 or not prompts or len(prompts) % engine.spec.minibatches:
            raise HpcRlhfError(
                f"{' and '.join(map(str, sorted(counts)))} prompts cannot be divided into "
                "equal minibatches on every rank",
                where="prompt_batch",
                hint=f"pass the same multiple of minibatches ({engine.spec.minibatches}) on every rank",
            )
        if any(other != prompts for other in world.gather_tensor_group(prompts)):
            raise HpcRlhfError(
                "ranks that share layers have different prompts",
                where="prompt_batch",
                hint=f"give each {world.dims.tensor} neighbouring ranks, a tensor_parallel group, the same",
            )
        keys: list[tuple[object, ...]] = [
            (engine.seed, "rollout", self._batches, world.data_rank, row) for row in range(len(prompts))
        ]
        self._batches += 1
        return self._trainer.evaluate(self._trainer.roll_out(prompts, keys, lambda: False), columns)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = prompt
        if isinstance(prompt, str):
            tokenizer = self.engine.tokenizer
            (ids,) = token_ids(tokenizer, [prompt_text(tokenizer, *parse_prompt(prompt))])
        return [int(token) for token in ids][-self.engine.max_prompt_tokens :]

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """The optimizer steps on an experience; returns the losses of actor and critic. Collective."""
        engine = self.engine
        stats = self._trainer.learn(experience, key=(engine.seed, "minibatches", self._learned))
        self._learned += 1
        self.metrics = metrics = summarize(experience, stats, engine.spec, engine.tokenizer.eos_token_id, engine.world)
        actor_loss, critic_loss = metrics["actor_loss"], metrics["critic_loss"]
        assert actor_loss is not None
        assert critic_loss is not None
        return actor_loss, critic_loss
