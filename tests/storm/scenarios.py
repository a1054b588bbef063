"""The chains that go through storms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.storm.server_strikes import SERVER_FAULTS
from tests.storm.strikes import Fault


@dataclass(frozen=True)
class Pace:
    """How long a stage of a storm is.

    Attributes:
        rate: its approximate steps per second.
        seconds: of work per fault.
        least: steps that it has at least.
    """

    rate: float
    seconds: float
    least: int


QUICK, SAMPLED = Pace(20.0, 2.0, 150), Pace(1.0, 4.0, 12)
# Eight ranks share two cores.
SLOW = Pace(2.0, 10.0, 40)


@dataclass(frozen=True)
class Scenario:
    """A chain and what is peculiar to its storms.

    Attributes:
        spec: its file in this folder.
        paces: of its stages; the last one needs the others.
        faults: that strike it besides those that strike all.
        span: seconds of an attempt within which it is struck.
        still: seconds without a word in the ledger after which nothing comes any more.
        env: more variables of its ranks.
        replays: whether the chain in peace learns from the responses of the one in the storm, because they cannot be
            generated again.
    """

    spec: str
    paces: Mapping[str, Pace]
    faults: tuple[Fault, ...] = ()
    span: float = 10.0
    still: float = 300.0
    env: Mapping[str, str] = field(default_factory=dict)
    replays: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.paces)


PPO = Scenario("storm.yaml", {"sft": QUICK, "reward": QUICK, "ppo": SAMPLED})
GRPO = Scenario("storm-grpo.yaml", {"sft": QUICK, "reward": QUICK, "grpo": SAMPLED})
# Eight ranks need a minute until they train.
PARALLEL = Scenario(
    "storm-3d.yaml", {"pretrain": SLOW, "sft": SLOW, "reward": SLOW, "grpo": SAMPLED}, span=90.0, still=1500.0
)
# An attempt needs a minute or two until its servers have started.
VLLM = Scenario(
    "storm-vllm.yaml", {"grpo": SAMPLED}, SERVER_FAULTS, span=120.0, still=1500.0,
    env={"PYTHONPATH": str(Path(__file__).with_name("impatient"))}, replays=True,
)  # fmt: skip
