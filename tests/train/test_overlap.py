"""One-step-off rollouts: each is drawn with the weights of one update earlier, wherever an attempt stops."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.run.layout import RunDir
from tests.spec.test_rollout import python_with
from tests.train.rollout.stand_in_vllm import interpreter
from tests.train.stages import make_run, metrics, tiny_spec
from tests.train.stopping import run_stopping
from tests.train.test_resume import LEARNING, same, stops

pytestmark = pytest.mark.train

BASE = {
    "micro_batch": 2, "global_batch": 8, "max_steps": 4, "warmup": 0, "rewards": [{"format": "(?s).*[a-p].*"}],
}  # fmt: skip
SHORT = {**BASE, "group_size": 2, "advantage": "reinforce++"}
GRPO = {**BASE, "group_size": 2, "num_iterations": 2, "minibatches": 2, "dynamic_sampling": 2, "dropout": 0.1}
PPO = {
    **BASE, "zero": 3, "precision": "bf16", "lora": {"rank": 4, "only": False},
    "eval_every": 2, "keep_best": "reward",
}  # fmt: skip


def run_of(folder: Path, stage: str, fields: dict[str, Any], **rollout: Any) -> RunDir:
    """A run whose responses depend only on weights, prompts and seeds."""
    folder.mkdir()
    python = Path(python_with(folder, "0.32.0"))
    interpreter(python.parent, "draws")
    own = {"engine": "vllm", "overlap": 1, "python": str(python), **rollout}
    return make_run(tiny_spec(folder / "run", **{stage: {**fields, "rollout": own}}))


def drawn(run: RunDir) -> list[tuple[str, int]]:
    """The weights that answered one after another, and how often they did."""
    lines = (run.stage("grpo").engine / "drawn").read_text().split()
    return [(weights, len(list(group))) for weights, group in groupby(lines)]


def test_every_rollout_is_drawn_with_the_weights_of_one_update_earlier_also_after_a_stop(tmp_path: Path) -> None:
    """Between safe points and in them, with the rollout complete or not."""
    short = run_of(tmp_path / "short", "grpo", SHORT)
    on_policy = run_of(tmp_path / "on-policy", "grpo", {**SHORT, "max_steps": 1}, overlap=0)
    one, one_stopped = (run_of(tmp_path / f"grpo-{how}", "grpo", GRPO) for how in ("whole", "stopped"))
    three, three_stopped = (run_of(tmp_path / f"ppo-{how}", "ppo", PPO) for how in ("whole", "stopped"))
    work = [
        (short, "grpo", []),
        (on_policy, "grpo", []),
        (one, "grpo", []),
        (one_stopped, "grpo", [2, ("experience", 1), (LEARNING, 6), 1, (LEARNING, 10), 12]),
        (three, "ppo", []),
        (three_stopped, "ppo", [2, (LEARNING, 3)]),
    ]
    run_stopping(work, 2)
    # Two servers answer in four steps, and in the end.
    (first, four), (second, two), *later = drawn(short)
    assert [four, two, *(count for _, count in later)] == [4, 2, 2, 2]
    assert drawn(on_policy) == [(first, 2), (second, 2)]
    assert max(line["sampler_kl"] for line in metrics(short, "grpo")) > 0
    same(one_stopped, one, "grpo")
    same(three_stopped, three, "ppo")
    assert sum(line["resampled"] for line in metrics(one, "grpo")) > 0
    assert {(0, 0), (0, 3), (1, 3), (2, 0)} <= set(stops(one_stopped, "grpo"))
    assert stops(three_stopped, "ppo") == [(0, 0), (1, 1)]
