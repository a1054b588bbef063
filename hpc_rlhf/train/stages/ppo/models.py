"""The four models of PPO, as engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.models import agreement
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.ema import Ema
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import DTYPES, check_fits, load_causal, load_reward, sharded_loading
from hpc_rlhf.train.models.rotary import check_rollouts
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.common import prepare_model


@dataclass(frozen=True)
class ModelSources:
    """Where PPO's models come from, and how they are built.

    Attributes:
        actor, reward: folders or hub ids.
        ds_configs: DeepSpeed configs, keyed by the names of ``PpoSpec.strategies``.
        longest: maximum tokens of a prompt plus its response.
        updates: optimizer steps of the whole stage.
        loading: wraps the loading of each model, given its DeepSpeed configuration.
    """

    actor: str
    reward: str
    ds_configs: dict[str, dict[str, Any]]
    longest: int
    updates: int
    seed: int
    loading: Callable[[dict[str, Any]], AbstractContextManager[None]] = sharded_loading


class PpoModels:
    """Actor and reference from the SFT model, critic and reward model from the reward model.

    Attributes:
        actor, critic: trainable DeepSpeed engines.
        ref, reward: frozen.
        policy, ref_policy: the transformers models inside actor and ref.
        ema: the actor's moving average, or None.
    """

    def __init__(self, spec: PpoSpec, start: ModelSources, tokenizer: Any, world: World) -> None:
        self.world, dtype, configs = world, DTYPES[spec.precision], start.ds_configs
        with start.loading(configs[""]):
            self.policy = load_causal(start.actor, dtype, spec.dropout)
        with start.loading(configs["critic"]):
            critic = load_reward(start.reward, dtype, None, spec.dropout)
        with start.loading(configs["ref"]):
            self.ref_policy = load_causal(start.actor, dtype)
        with start.loading(configs["reward"]):
            reward = load_reward(start.reward, dtype, None)
        check_fits(self.policy.config, tokenizer, start.longest, start.actor)
        check_fits(critic.classifier.config, tokenizer, start.longest, start.reward)
        check_rollouts(self.policy.config, start.longest, start.actor)
        prepare_model(self.policy, spec, start.seed)
        prepare_model(critic.classifier, spec.of_critic, start.seed)
        self.actor = engines.training_engine(
            LanguageModel(self.policy), configs[""], spec, spec.actor_lr, start.updates
        )
        self.critic = engines.training_engine(critic, configs["critic"], spec.of_critic, spec.critic_lr, start.updates)
        self.ref = engines.frozen_engine(LanguageModel(self.ref_policy), configs["ref"], world.device)
        self.reward = engines.frozen_engine(reward, configs["reward"], world.device)
        agreement.verify(self.actor, world, start.actor, spec.dropout)
        agreement.verify(self.critic, world, start.reward, spec.dropout)
        agreement.verify(self.ref, world, start.actor)
        agreement.verify(self.reward, world, start.reward)
        self.ema = Ema(self.policy, spec.ema_beta, world) if spec.ema else None

    def save(self, snapshot: Snapshot) -> None:
        """Add what training changes to a snapshot. Collective."""
        engines.save(self.actor, snapshot, "actor", self.world)
        engines.save(self.critic, snapshot, "critic", self.world)
        if self.ema:
            self.ema.save(snapshot, "ema")

    def load(self, checkpoint: Checkpoint) -> None:
        engines.load(self.actor, checkpoint.folder / "actor", self.world)
        engines.load(self.critic, checkpoint.folder / "critic", self.world)
        if self.ema:
            self.ema.load(checkpoint.folder / "ema")
