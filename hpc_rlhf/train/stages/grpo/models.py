"""The models of GRPO, as engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpc_rlhf.spec.stages import GrpoSpec
from hpc_rlhf.train.models import agreement, lora
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import DTYPES, check_fits, load_causal
from hpc_rlhf.train.models.rotary import check_rollouts
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.common import prepare_model
from hpc_rlhf.train.stages.policy.models import ModelSources, PolicyModels


class GrpoModels(PolicyModels):
    """The actor, and its reference if there is a KL penalty.

    If only adapters are trained, the actor without them is the reference, and there is no second model.
    """

    def __init__(self, spec: GrpoSpec, start: ModelSources, tokenizer: Any, world: World) -> None:
        self.world, dtype, configs = world, DTYPES[spec.precision], start.ds_configs
        self.has_start = spec.lora is not None and spec.lora.only
        with start.loading(configs[""]):
            self.policy = load_causal(start.actor, dtype, spec.dropout)
        self.ref_policy = None
        if "ref" in configs:
            with start.loading(configs["ref"]):
                self.ref_policy = load_causal(start.actor, dtype)
        check_fits(self.policy.config, tokenizer, start.longest, start.actor)
        check_rollouts(self.policy.config, start.longest, start.actor)
        prepare_model(self.policy, spec, start.seed)
        self.actor = engines.training_engine(LanguageModel(self.policy), configs[""], spec, spec.lr, start.updates)
        agreement.verify(self.actor, world, start.actor, spec.dropout)
        self.ref = self._without_adapters if spec.kl_coef else None
        if self.ref_policy is not None:
            self.ref = engines.frozen_engine(LanguageModel(self.ref_policy), configs["ref"], world.device)
            agreement.verify(self.ref, world, start.actor)
        self.reward = self.judge(spec, start)
        self.ema = self.average(spec)

    def _without_adapters(self, *inputs: Any) -> Any:
        with lora.off(self.policy):
            return self.actor(*inputs)

    @contextmanager
    def at_start(self) -> Iterator[Any]:
        if self.ref_policy is not None or not self.has_start:
            yield self.ref_policy
            return
        with lora.off(self.policy):
            yield self.policy
