"""A whole loop: a run, its server, votes over HTTP, next, and a run of the next round, which voters like better."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.train.data.arrow import Rows
from tests.loop.loop import answers, hpc_rlhf, like, next_round

# The demo, with a smaller model that is only fine-tuned, and more held-out prompts.
SPEC = """
name: first
run_dir: first
slurm: {gpus_per_node: 1, cpus_per_gpu: 1}
data: {sources: [{demo: 2500}], held_out: 0.2, max_prompt_tokens: 48, max_answer_tokens: 32}
models:
  actor:
    from_scratch: {model_type: llama, vocab_size: 512, hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2,
                   num_attention_heads: 4, num_key_value_heads: 4}
stages:
  sft: {epochs: 3, lr: 5e-3, global_batch: 32, micro_batch: 32, precision: fp32}
"""

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = tmp_path_factory.mktemp("loop") / "first.yaml"
    spec.write_text(SPEC)
    hpc_rlhf("run", spec)
    return spec.with_name("first")


@pytest.mark.parametrize(
    ("models", "stage", "epochs"), [(["sft", "sft"], "dpo", 1), (["sft"], "kto", 6)], ids=("pairs", "thumbs")
)
def test_voters_like_the_next_round_better(
    first: Path, tmp_path: Path, models: list[str], stage: str, epochs: int
) -> None:
    # In one epoch, so small a model learns too little from 300 votes for an interval to show it.
    following = next_round(first, tmp_path, models, "--set", f"stages.{stage}.epochs={epochs}")
    liked = like(following, stage)
    assert liked.low > 0.5, liked
    (trained,) = following.stage(stage).data.glob("*/train.arrow")
    rows = Rows(trained)
    assert {row["prompt"] for row in answers(following)}.isdisjoint(rows[place]["prompt"] for place in range(len(rows)))
