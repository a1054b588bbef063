"""What the models of PPO and GRPO have in common: an actor in training, its start, and its moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models import agreement
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.ema import Ema
from hpc_rlhf.train.models.loading import DTYPES, load_reward, loading, sharded_loading
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.common import reward_model, start_actor


@dataclass(frozen=True)
class ModelSources:
    """Where the models come from, and how they are built.

    Attributes:
        actor, reward: folders or hub ids; without a reward model, a critic starts from the actor with a new head.
        ds_configs: DeepSpeed configs, keyed by the names of the spec's ``strategies``.
        longest: maximum tokens of a prompt plus its response.
        updates: optimizer steps of the whole stage.
        loading: wraps the loading of each model, given its DeepSpeed configuration.
    """

    actor: str
    reward: str | None
    ds_configs: dict[str, dict[str, Any]]
    longest: int
    updates: int
    seed: int
    loading: Callable[[dict[str, Any]], AbstractContextManager[None]] = sharded_loading


def model_sources(context: StageContext, spec: PolicySpec, updates: int) -> ModelSources:
    """The sources of a stage's models.

    Args:
        updates: optimizer steps of the whole stage.
    """
    return ModelSources(
        actor=start_actor(context),
        reward=None if "reward" in spec.unneeded else reward_model(context),
        ds_configs=context.ds_configs,
        longest=context.longest,
        updates=updates,
        seed=context.spec.seed,
        loading=partial(loading, context.stop),
    )


class PolicyModels:
    """The actor, and the models beside it.

    Attributes:
        actor: a trainable DeepSpeed engine.
        policy: the transformers model inside.
        ref: gives the reference's log-probabilities; None without a reference.
        ref_policy: the transformers model inside the reference, if it is a model of its own.
        reward: the run's reward model, frozen; None if the stage does not use it.
        ema: the actor's moving average, or None.
    """

    actor: Any
    policy: Any
    ref: Any
    ref_policy: Any
    reward: Any
    world: World
    ema: Ema | None

    def judge(self, spec: PolicySpec, start: ModelSources) -> Any:
        """The run's reward model as a frozen engine; None if the stage does not use it."""
        if start.reward is None:
            return None
        with start.loading(start.ds_configs["reward"]):
            reward = load_reward(start.reward, DTYPES[spec.precision], None)
        engine = engines.frozen_engine(reward, start.ds_configs["reward"], self.world.device)
        agreement.verify(engine, self.world, start.reward)
        return engine

    def average(self, spec: PolicySpec) -> Ema | None:
        return Ema(self.policy, spec.ema_beta, self.world) if spec.ema else None

    @property
    def trained(self) -> dict[str, Any]:
        """The engines in training, by name."""
        return {"actor": self.actor}

    @contextmanager
    def at_start(self) -> Iterator[Any]:
        """Within it, the value is the policy before training; None if it is gone."""
        yield self.ref_policy

    def save(self, snapshot: Snapshot) -> None:
        """Add what training changes to a snapshot. Collective."""
        for name, engine in self.trained.items():
            engines.save(engine, snapshot, name, self.world)
        if self.ema:
            self.ema.save(snapshot, "ema")

    def load(self, checkpoint: Checkpoint) -> None:
        for name, engine in self.trained.items():
            engines.load(engine, checkpoint.folder / name, self.world)
        if self.ema:
            self.ema.load(checkpoint.folder / "ema")
