"""The models of PPO, as engines."""

from __future__ import annotations

from typing import Any

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.models import agreement
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import DTYPES, check_fits, load_causal, load_reward
from hpc_rlhf.train.models.rotary import check_rollouts
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.common import prepare_model
from hpc_rlhf.train.stages.policy.models import ModelSources, PolicyModels


class PpoModels(PolicyModels):
    """Actor and reference from the SFT model, critic and reward model from the reward model.

    Attributes:
        actor, critic: trainable DeepSpeed engines.
        ref, reward: frozen. There is no reward model if there is none to start from.
        policy, ref_policy: the transformers models inside actor and ref.
        ema: the actor's moving average, or None.
    """

    def __init__(self, spec: PpoSpec, start: ModelSources, tokenizer: Any, world: World) -> None:
        self.world, dtype, configs = world, DTYPES[spec.precision], start.ds_configs
        of_critic, new_head = (start.actor, start.seed) if start.reward is None else (start.reward, None)
        with start.loading(configs[""]):
            self.policy = load_causal(start.actor, dtype, spec.dropout)
        with start.loading(configs["critic"]):
            critic = load_reward(of_critic, dtype, new_head, spec.dropout)
        with start.loading(configs["ref"]):
            self.ref_policy = load_causal(start.actor, dtype)
        check_fits(self.policy.config, tokenizer, start.longest, start.actor)
        check_fits(critic.classifier.config, tokenizer, start.longest, of_critic)
        check_rollouts(self.policy.config, start.longest, start.actor)
        prepare_model(self.policy, spec, start.seed)
        prepare_model(critic.classifier, spec.of_critic, start.seed)
        self.actor = engines.training_engine(
            LanguageModel(self.policy), configs[""], spec, spec.actor_lr, start.updates
        )
        self.critic = engines.training_engine(critic, configs["critic"], spec.of_critic, spec.critic_lr, start.updates)
        self.ref = engines.frozen_engine(LanguageModel(self.ref_policy), configs["ref"], world.device)
        agreement.verify(self.actor, world, start.actor, spec.dropout)
        agreement.verify(self.critic, world, of_critic, spec.dropout)
        agreement.verify(self.ref, world, start.actor)
        self.reward = self.judge(spec, start)
        self.ema = self.average(spec)

    @property
    def trained(self) -> dict[str, Any]:
        return {"actor": self.actor, "critic": self.critic}
