"""The inputs of stages: PPO needs a reward model, DPO needs neither that nor fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.stage_inputs import inputs
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
        ("pretrain: {sources: [{demo: 90}]}, sft: {}", {"pretrain": (), "sft": ("pretrain",)}),
        (
            "pretrain: {sources: [{demo: 90}]}, sft: {}, reward: {}, ppo: {}, dpo: {}",
            {"pretrain": (), "sft": ("pretrain",), "reward": ("pretrain",), "ppo": ("sft", "reward"), "dpo": ("sft",)},
        ),
        ("pretrain: {sources: [{demo: 90}]}, dpo: {}", {"pretrain": (), "dpo": ("pretrain",)}),
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


def test_a_reward_model_of_its_own_does_not_wait_for_pretraining(tmp_path: Path) -> None:
    stages = "stages: {pretrain: {sources: [{demo: 90}]}, reward: {}}\n"
    text = HEAD.replace("}", ", reward: facebook/opt-350m}") + PAIRS + stages
    (tmp_path / "job.yaml").write_text(text)
    assert load_spec(tmp_path / "job.yaml").needs("reward") == ()


def test_pretraining_alone_needs_no_other_data(tmp_path: Path) -> None:
    path = write(tmp_path, "stages: {pretrain: {sources: [{demo: 90}]}}\n")
    assert load_spec(path).shares == {}
    with pytest.raises(SpecError, match="data: is missing"):
        load_spec(path, ["stages.sft={}"])
    with pytest.raises(
        SpecError, match=r"pretrain\.eval_every: needs held-out data, but stages\.pretrain\.held_out is 0"
    ):
        load_spec(path, ["stages.pretrain.held_out=0", "stages.pretrain.eval_every=5"])
    (tmp_path / "chat.jsonl").write_text("")
    with pytest.raises(SpecError, match="chat\\.jsonl needs format: text"):
        load_spec(path, [f"stages.pretrain.sources=[{{path: {tmp_path}/chat.jsonl, format: hh}}]"])


def test_what_pretraining_depends_on(tmp_path: Path) -> None:
    """The data of later stages matter to a model from scratch only, whose tokenizer is trained on them."""
    stages = "stages: {pretrain: {sources: [{demo: 90}]}, sft: {}}\n"
    spec = load_spec(write(tmp_path, PAIRS + stages))
    other = load_spec(write(tmp_path, PAIRS + stages), ["data.sources=[{demo: 200}]"])
    assert inputs(spec, "pretrain") == inputs(other, "pretrain")
    assert inputs(spec, "sft") != inputs(other, "sft")
    scratch = ["models.actor={from_scratch: {model_type: llama, vocab_size: 300}}"]
    spec, other = (load_spec(tmp_path / "job.yaml", [*scratch, *more]) for more in ([], ["data.sources=[{demo: 200}]"]))
    assert inputs(spec, "pretrain") != inputs(other, "pretrain")


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
