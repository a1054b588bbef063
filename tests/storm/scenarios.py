"""The chains that go through storms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.storm.server_strikes import SERVER_FAULTS
from tests.storm.strikes import Fault


@dataclass(frozen=True)
class Scenario:
    """A chain and what is peculiar to its storms.

    Attributes:
        spec: its file in this folder.
        stages: the last one needs the others.
        faults: that strike it besides those that strike all.
        span: seconds of an attempt within which it is struck.
        still: seconds without a word in the ledger after which nothing comes any more.
        env: more variables of its ranks.
        replays: whether the chain in peace learns from the responses of the one in the storm, because they cannot be
            generated again.
    """

    spec: str
    stages: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    span: float = 10.0
    still: float = 300.0
    env: Mapping[str, str] = field(default_factory=dict)
    replays: bool = False


PPO = Scenario("storm.yaml", ("sft", "reward", "ppo"))
GRPO = Scenario("storm-grpo.yaml", ("sft", "reward", "grpo"))
# An attempt needs a minute or two until its servers have started.
VLLM = Scenario(
    "storm-vllm.yaml", ("grpo",), SERVER_FAULTS, span=120.0, still=1500.0,
    env={"PYTHONPATH": str(Path(__file__).with_name("impatient"))}, replays=True,
)  # fmt: skip
