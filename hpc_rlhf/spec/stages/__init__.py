"""The stages of a run: one file per stage, and the registry.

To add a stage, write a file here with its fields and its `StageKind`, add it to `STAGE_KINDS`, and write a
module of the same name in `train/stages` with a function `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from hpc_rlhf.spec.fields import Model, add_fields
from hpc_rlhf.spec.stages.dpo import DPO, DpoSpec
from hpc_rlhf.spec.stages.eval import EVAL, EvalSpec
from hpc_rlhf.spec.stages.grpo import GRPO, GrpoSpec
from hpc_rlhf.spec.stages.kind import Data, Plot, StageKind
from hpc_rlhf.spec.stages.kto import KTO, KtoSpec
from hpc_rlhf.spec.stages.ppo import PPO, CriticSpec, PpoSpec
from hpc_rlhf.spec.stages.pretrain import PRETRAIN, PretrainSpec
from hpc_rlhf.spec.stages.reward import REWARD, RewardSpec
from hpc_rlhf.spec.stages.sft import SFT, SftSpec

__all__ = [
    "BASE", "DPO", "EVALUATION", "GRPO", "KTO", "POLICIES", "PPO", "SFT", "STAGE_KINDS", "STAGE_NAMES",
    "CriticSpec", "Data", "DpoSpec", "EvalSpec", "GrpoSpec", "KtoSpec", "Plot", "PpoSpec", "PretrainSpec",
    "RewardSpec", "SftSpec", "StageKind", "StagesSpec", "kind_of",
]  # fmt: skip

# Each stage after its inputs; the first that makes a policy is BASE.
STAGE_KINDS: tuple[StageKind, ...] = (PRETRAIN, SFT, REWARD, PPO, GRPO, DPO, KTO, EVAL)
STAGE_NAMES = tuple(kind.name for kind in STAGE_KINDS)
_BY_NAME = {kind.name: kind for kind in STAGE_KINDS}

# The policy that later ones start from and are compared with.
BASE = next(kind for kind in STAGE_KINDS if kind.makes_policy)
EVALUATION = next(kind for kind in STAGE_KINDS if kind.makes == "report")
# The chat models that a run can make, each with the stage that makes it.
POLICIES: dict[str, StageKind] = {
    model: kind for kind in STAGE_KINDS if kind.makes_policy for model in (kind.name, kind.average) if model is not None
}


def kind_of(stage: str | type) -> StageKind:
    """The kind of a stage, by its name or by the class of its fields."""
    if isinstance(stage, str):
        return _BY_NAME[stage]
    return next(kind for kind in STAGE_KINDS if kind.spec is stage)


@add_fields({kind.name: (kind.spec | None, Field(default=None, description=kind.description)) for kind in STAGE_KINDS})
class StagesSpec(Model):
    """The stages to run. SFT starts from the pretrained model, if there is one, and PPO, GRPO, DPO and KTO start from
    the SFT model, or else from the pretrained one. PPO needs a reward model or other rewards, GRPO rewards."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="after")
    def _check_graph(self) -> StagesSpec:
        trained = [kind.name for kind in STAGE_KINDS if kind.trains]
        if all(getattr(self, name) is None for name in trained):
            raise ValueError(f"set at least one stage: {', '.join(trained[:-1])} or {trained[-1]}")
        return self
