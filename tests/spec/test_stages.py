"""The inputs of stages: PPO needs a reward model, DPO needs neither that nor fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.stages import GrpoSpec

HEAD = "name: x\nrun_dir: run\nmodels: {actor: facebook/opt-125m}\n"
PAIRS = "data: {sources: [{demo: 100}]}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(HEAD + text)
    return path


@pytest.mark.parametrize(
    ("stages", "needs"),
    [
        ("dpo: {}", {"dpo": ()}),
        ("dpo: {}, sft: {}", {"sft": (), "dpo": ("sft",)}),
        ("sft: {}, dpo: {}, ppo: {}, reward: {}", {"sft": (), "reward": (), "ppo": ("sft", "reward"), "dpo": ("sft",)}),
        ("grpo: {rewards: [{exact: answer}], group_size: 4}", {"grpo": ()}),
        ("ppo: {rewards: [{exact: answer}]}", {"ppo": ()}),
        (
            "reward: {}, grpo: {rewards: [{format: a}], group_size: 4}, ppo: {rewards: [{model: reward}, {format: a}]}",
            {"reward": (), "ppo": ("reward",), "grpo": ()},
        ),
    ],
)
def test_inputs_of_stages(tmp_path: Path, stages: str, needs: dict[str, tuple[str, ...]]) -> None:
    spec = load_spec(write(tmp_path, f"{PAIRS}stages: {{{stages}}}\n"))
    assert {name: spec.needs(name) for name in spec.stage_names} == needs
    assert spec.stage_names == tuple(needs)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("data: {sources: [{path: a.jsonl, format: text}]}", "none contains pairs of responses, which the dpo stage"),
        ("data: {sources: [{demo: 100}], split: {dpo: 0}}", "data.split.dpo: leaves the dpo stage without data"),
    ],
)
def test_dpo_needs_pairs(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec(write(tmp_path, f"{data}\nstages: {{dpo: {{}}}}\n"))


def test_label_smoothing_is_below_a_half(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"stages\.dpo\.label_smoothing: .*less than 0\.5"):
        load_spec(write(tmp_path, f"{PAIRS}stages: {{dpo: {{label_smoothing: 0.5}}}}\n"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("sft: {keep_best: loss}", r"stages\.sft\.keep_best: needs eval_every"),
        ("sft: {eval_every: 10, keep_best: accuracy}", "keep_best: must be perplexity or loss, not accuracy"),
        ("reward: {}, ppo: {eval_every: 10, keep_best: kl}", "ppo.keep_best: must be reward, not kl"),
        ("sft: {eval_every: 1.5}", "eval_every: must be a number of steps, or a fraction"),
        ("sft: {eval_every: 10 min}", "eval_every: must be a number of steps, or a fraction"),
        ("sft: {eval_every: 10}, reward: {eval_every: 0.1, keep_best: accuracy}", ""),
    ],
)
def test_evaluations_during_training(tmp_path: Path, fields: str, message: str) -> None:
    path = write(tmp_path, f"{PAIRS}stages: {{{fields}}}\n")
    if message:
        with pytest.raises(SpecError, match=message):
            load_spec(path)
        return
    load_spec(path)
    with pytest.raises(SpecError, match=r"stages\.reward\.eval_every: needs held-out data, but data\.held_out is 0"):
        load_spec(path, ["data.held_out=0"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("", r"stages\.grpo\.rewards: grpo needs some, such as"),
        ("rewards: [{model: reward}], group_size: 4", r"stages\.grpo: needs the reward stage, or a finished"),
        ("rewards: [{exact: answer}], overlong_margin: 5", "overlong_margin is for overlong: penalty"),
        ("rewards: [{exact: answer}], kl_coef: 0.1, kl_in: reward, top_k: 50", "kl_in: reward needs top_p: 1"),
        (
            "rewards: [{exact: answer}], micro_batch: 2, global_batch: 12, group_size: 8",
            r"stages\.grpo\.group_size: grpo's group_size 8 does not divide the 12 responses of a rank \(global_batch "
            r"12 x minibatches 1 / 1 ranks\); use group_size: 2 or 3 or 4 or 6 or 12, or another global_batch",
        ),
        ("rewards: [{exact: answer}], micro_batch: 4, group_size: 8, minibatches: 2", ""),
    ],
)
def test_grpo_needs_rewards_and_whole_groups(tmp_path: Path, fields: str, message: str) -> None:
    path = write(tmp_path, f"{PAIRS}slurm: {{gpus_per_node: 0, ranks_per_node: 1}}\nstages: {{grpo: {{{fields}}}}}\n")
    if not message:
        load_spec(path)
        return
    with pytest.raises(SpecError, match=message):
        load_spec(path)


@pytest.mark.parametrize(
    ("fields", "roles"),
    [
        ({}, {""}),
        ({"kl_coef": 0.1}, {"", "ref"}),
        ({"kl_coef": 0.1, "lora": {"rank": 4}}, {""}),
        ({"kl_coef": 0.1, "lora": {"rank": 4, "only": False}}, {"", "ref"}),
        ({"rewards": [{"model": "reward"}]}, {"", "reward"}),
    ],
)
def test_grpo_holds_only_the_models_that_it_uses(fields: dict[str, Any], roles: set[str]) -> None:
    assert set(GrpoSpec.model_validate({"rewards": [{"exact": "answer"}], **fields}).strategies) == roles
