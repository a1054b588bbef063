"""PPO in a program of one's own, by the names that DeepSpeed-Chat gave it; the steps are those of the ppo stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import PlannedJob
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.spec.batch import Batch
from hpc_rlhf.spec.sizes import ROWS
from hpc_rlhf.spec.stages import PPO, PpoSpec
from hpc_rlhf.train.data.dialogues import follow, prompt_text, token_ids
from hpc_rlhf.train.data.rows import asked
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.models.tokenizers import load_tokenizer
from hpc_rlhf.train.rollout.experience import Experience
from hpc_rlhf.train.runtime import world as worlds
from hpc_rlhf.train.runtime.launcher import launcher_ranks
from hpc_rlhf.train.stages.ppo.metrics import summarize
from hpc_rlhf.train.stages.ppo.models import PpoModels, Start
from hpc_rlhf.train.stages.ppo.trainer import PpoTrainer, Sizes

# Fields of a ppo stage that say how long it goes on, what it keeps and where it runs: here the program does.
PROGRAM_SAYS = (
    "epochs", "max_steps", "global_batch", "checkpoint_every", "mttf", "keep_checkpoints", "slurm", "ptx", "ptx_coef",
)  # fmt: skip


def _settings(args: Mapping[str, object]) -> PpoSpec:
    for field in PROGRAM_SAYS:
        if field in args:
            raise HpcRlhfError(
                f"{field} is for the ppo stage of a job; in a program the program says that", where="args"
            )
    try:
        return PpoSpec.model_validate(dict(args))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'args'}: {e['msg']}" for e in error.errors()]
        raise HpcRlhfError(
            "; ".join(wrong), where="args", hint="the fields are those of stages.ppo"
        ) from error


def _check_reward_model(source: str) -> None:
    """Refuse a model whose score head transformers would make on the spot."""
    from transformers import AutoConfig

    try:
        names = AutoConfig.from_pretrained(source).architectures or []
    except (OSError, ValueError):
        return  # loading it tells what is wrong
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise HpcRlhfError(
            "it is no reward model: it has no score head",
            where=source,
            hint="give the model of a reward stage",
        )


class DeepSpeedRLHFEngine:
    """The four models of PPO, as DeepSpeed engines on this process's rank.

    Start the program on every rank, by ``deepspeed``, ``torchrun`` or ``srun``; alone, it is the only rank.

    Args:
        actor_model_name_or_path: the fine-tuned model: the actor, and what it is held to.
        critic_model_name_or_path: a trained reward model: the critic's start, and what scores the answers.
        tokenizer: the tokenizer of both, or where it loads from; the actor's when left out.
        num_total_iters: optimizer steps that the learning-rate schedule is for.
        args: fields of ``stages.ppo``, such as ``{"actor_lr": 1e-6, "zero": 3}``.
        max_prompt_tokens, max_answer_tokens: longest prompt, and longest answer sampled.
        seed: of the sampling.

    Attributes:
        models: the engines ``actor``, ``critic``, ``ref`` and ``reward``.

    Raises:
        HpcRlhfError: a setting is wrong, or a model does not load.
    """

    def __init__(
        self, actor_model_name_or_path: str, critic_model_name_or_path: str, tokenizer: object = None,
        num_total_iters: int = 1000, args: Mapping[str, object] | None = None, *,
        max_prompt_tokens: int = 256, max_answer_tokens: int = 256, seed: int = 1234,
    ) -> None:  # fmt: skip
        self.spec = _settings(args or {})
        self.max_prompt_tokens, self.max_answer_tokens, self.seed = max_prompt_tokens, max_answer_tokens, seed
        self.world = worlds.join(launcher_ranks()[1]).with_tensor_parallel(self.spec.tensor_parallel)
        if tokenizer is None or isinstance(tokenizer, str):
            source = tokenizer or actor_model_name_or_path
            tokenizer = load_tokenizer(source, iter(()), Path(source), self.world)
        self.tokenizer = follow(tokenizer, "auto")
        _check_reward_model(critic_model_name_or_path)
        batch = Batch(
            self.spec.micro_batch, 1, self.world.dims.data, self.spec.micro_batch * self.world.dims.data
        )
        job = PlannedJob(PPO.name, PPO.name, (), self.spec, self.spec.slurm, batch)
        start = Start(
            actor=actor_model_name_or_path,
            reward=critic_model_name_or_path,
            ds_configs={model: json.loads(text) for model, text in Templates().ds_configs(job).items()},
            longest=max_prompt_tokens + max_answer_tokens,
            updates=num_total_iters,
            seed=seed,
        )
        self.models = PpoModels(self.spec, start, self.tokenizer, self.world)

    def save_pretrained(self, folder: str) -> None:
        """Write the actor for ``from_pretrained``, adapters merged; its moving average to ``ema`` in it. Collective."""
        target, models = Path(folder), self.models
        export(models.policy, self.tokenizer, target, self.world.is_main)
        if models.ema:
            with models.ema.swapped_in():
                export(models.policy, self.tokenizer, target / "ema", self.world.is_main)
        self.world.barrier()


class DeepSpeedPPOTrainer:
    """PPO's steps: answers to a batch of prompts, and what is learnt from them.

    Attributes:
        metrics: of the last step: reward, kl, entropy, clipfrac and the others of a ppo stage's metrics.jsonl.
    """

    def __init__(self, engine: DeepSpeedRLHFEngine) -> None:
        self.engine = engine
        world, longest = engine.world, engine.max_prompt_tokens + engine.max_answer_tokens
        sizes = Sizes(
            engine.spec.micro_batch * longest, engine.max_answer_tokens, ROWS, float(world.dims.data)
        )
        self._steps = PpoTrainer(engine.spec, engine.models, engine.tokenizer, sizes, world)
        self._batches = 0
        self.metrics: dict[str, float] = {}

    def generate_experience(self, prompt_batch: Sequence[str | Sequence[int]]) -> Experience:
        """Sample an answer to each prompt, and find out what it is worth. Collective.

        Args:
            prompt_batch: this rank's prompts, as many as every other rank's: questions or transcripts that end with
                ``Assistant:``, or token ids. A longer one than max_prompt_tokens is cut at the left. Under
                tensor_parallel, the ranks of a group give the same ones.

        Raises:
            HpcRlhfError: not a whole number of prompts for each of the minibatches, or not on every rank, or ranks
                that share layers have different ones.
        """
        engine, world = self.engine, self.engine.world
        prompts = [self._prompt_ids(prompt) for prompt in prompt_batch]
        counts = set(world.gather(len(prompts)))
        if len(counts) > 1 or not prompts or len(prompts) % engine.spec.minibatches:
            raise HpcRlhfError(
                f"{' and '.join(map(str, sorted(counts)))} prompts are no equal minibatches for every rank",
                where="prompt_batch",
                hint=f"give every rank the same number, a multiple of minibatches, {engine.spec.minibatches}",
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
        return self._steps.evaluate(self._steps.roll_out(prompts, keys, lambda: False))

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = prompt
        if isinstance(prompt, str):
            tokenizer = self.engine.tokenizer
            (ids,) = token_ids(tokenizer, [prompt_text(tokenizer, *asked(prompt))])
        return [int(token) for token in ids][-self.engine.max_prompt_tokens :]

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """Make the optimizer steps on an experience; gives the losses of actor and critic. Collective."""
        learnt = self._steps.learn(experience)
        engine = self.engine
        self.metrics = summarize(experience, learnt, engine.tokenizer.eos_token_id, engine.world.sums)
        return self.metrics["actor_loss"], self.metrics["critic_loss"]
