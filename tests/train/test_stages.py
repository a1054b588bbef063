"""The stages on real ranks: they resume exactly, and refuse invalid inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpc_rlhf.errors import INPUT_WRONG
from hpc_rlhf.run import manifest
from hpc_rlhf.run.events import Failed, Resumed
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import EvalSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.runtime.stop_signals import StopFlag
from hpc_rlhf.train.runtime.world import World
from hpc_rlhf.train.stages.eval.stage import Evaluation
from tests.train.grid import run_chains
from tests.train.stages import log_tail, make_run, metrics, run_stage, tiny_spec, weights_digest

pytestmark = pytest.mark.train
STAGES = ("sft", "reward", "ppo")

# Every feature that a checkpoint must carry: sharded weights, adapters, moving average, pretraining mixture.
EVERYTHING: dict[str, Any] = {
    "zero": 3, "precision": "bf16", "lora": {"rank": 4, "only": False}, "activation_checkpointing": True,
}  # fmt: skip
OFFLOADED = {**EVERYTHING, "offload_optimizer": True, "offload_params": True}
PPO_EVERYTHING = {
    **OFFLOADED, "offload_frozen": True, "critic": {"zero": 2, "offload_optimizer": False},
    "ema": True, "ptx": {"demo": 50}, "ppo_epochs": 2, "minibatches": 2, "top_p": 0.9, "top_k": 50,
    "kl_target": 1e-3, "kl_horizon": 100, "normalize_scores": True, "whiten_rewards": True, "stop_kl": 1e-6,
}  # fmt: skip
CUT = {
    **PPO_EVERYTHING, "zero": 1, "tensor_parallel": 2, "offload_params": False, "offload_frozen": False,
    "critic": {"zero": 2, "offload_optimizer": False},
}  # fmt: skip

SHARED = {**PPO_EVERYTHING, "sequence_parallel": 2}


def run_chain(run: RunDir, stop_after: int | None = None, ranks: int = 2) -> None:
    for stage in STAGES:
        if stop_after is not None:
            assert run_stage(run, stage, ranks, stop_after) == [75] * ranks, log_tail(run, stage)
        assert run_stage(run, stage, ranks) == [0] * ranks, log_tail(run, stage)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A chain without sharding, in float32."""
    run = make_run(tiny_spec(tmp_path_factory.mktemp("plain") / "run"))
    run_chain(run)
    return run


def train_lines(run: RunDir, stage: str) -> list[dict[str, Any]]:
    return [line for line in metrics(run, stage) if line["kind"] == "train"]


def test_a_chain_hands_over_models_that_load(plain: RunDir) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for stage in STAGES:
        facts = manifest.require(plain.stage(stage).model, stage)
        assert facts["step"] == train_lines(plain, stage)[-1]["total_steps"]
    cards = {stage: plain.stage(stage).model / "README.md" for stage in STAGES}
    assert [stage for stage, card in cards.items() if card.exists()] == ["sft", "ppo"]
    assert "SFT → Reward model → PPO" in cards["ppo"].read_text()
    tokenizer = AutoTokenizer.from_pretrained(plain.stage("ppo").model)
    actor = AutoModelForCausalLM.from_pretrained(plain.stage("ppo").model)
    ids = tokenizer("\n\nHuman: What does a cow say?\n\nAssistant:", return_tensors="pt")["input_ids"]
    assert actor.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    reward = AutoModelForSequenceClassification.from_pretrained(plain.stage("reward").model)
    assert reward.num_labels == 1
    measured = manifest.require(plain.stage("reward").model, "reward")["metrics"]["chosen_score"]
    assert reward.config.score_offset == measured != 0


def test_the_first_ppo_step_starts_from_the_reference(plain: RunDir) -> None:
    """Without dropout and before any update the actor equals the reference, and every ratio is 1."""
    first = train_lines(plain, "ppo")[0]
    assert (first["kl"], first["ratio"], first["approx_kl"], first["clipfrac"]) == (0.0, 1.0, 0.0, 0.0)
    expected = {"entropy", "value_clipfrac", "eos_rate", "answer_tokens", "explained_variance", "reward", "kl_coef"}
    assert expected <= {name for name, value in first.items() if value is not None}
    assert train_lines(plain, "ppo")[-1]["kl"] > 0


def test_samples_appear_once_and_end_with_a_comparison(plain: RunDir) -> None:
    rows = [json.loads(line) for line in plain.stage("ppo").samples.read_text().splitlines()]
    rollouts = [row["step"] for row in rows if row["kind"] == "rollout"]
    assert rollouts == sorted(rollouts)
    final = [row for row in rows if row["kind"] == "final"]
    assert final
    assert {"prompt", "answer", "reward", "sft_answer", "sft_reward"} <= set(final[0])


def test_fine_tuning_and_evaluation_measure_one_perplexity(tmp_path: Path, world: World) -> None:
    """That of responses, and of texts without a prompt, although prompts are learned as well."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Snow is white, {n} is a number. " * 5}) + "\n" for n in range(40)))
    spec = tiny_spec(tmp_path / "run", 1, sft={"answer_only": False, "max_steps": 1})
    sources = (*spec.data.sources, SourceSpec(path=str(texts), format="text"))
    data = spec.data.model_copy(update={"sources": sources})
    stages = spec.stages.model_copy(update={"eval": EvalSpec(prompts=1, precision="fp32")})
    run = make_run(spec.model_copy(update={"data": data, "stages": stages}))
    assert run_stage(run, "sft", 1) == [0], log_tail(run, "sft")
    context = StageContext(read_spec(run.job_yaml), "eval", run, world, StopFlag(), "a")
    measured = Evaluation(context).measure("sft", str(run.stage("sft").model))["sft_perplexity"]
    trained = manifest.require(run.stage("sft").model, "sft")["metrics"]["perplexity_after"]
    assert measured == pytest.approx(trained, rel=1e-5)


def test_a_stopped_chain_ends_in_the_same_weights(tmp_path: Path) -> None:
    """A chain stopped and resumed in every stage equals the undisturbed chain bit for bit."""

    def make(name: str) -> RunDir:
        return make_run(
            tiny_spec(tmp_path / name, sft=EVERYTHING, reward={**OFFLOADED, "loss": "last"}, ppo=PPO_EVERYTHING)
        )

    whole, stopped = make("whole"), make("stopped")
    run_chain(whole)
    run_chain(stopped, stop_after=1)
    for stage in STAGES:
        assert weights_digest(stopped, stage) == weights_digest(whole, stage), stage
        resumed = Ledger(stopped.ledger).last(Resumed, stage)
        assert resumed is not None
        assert resumed.step >= 1
        numbers = [{k: v for k, v in line.items() if k != "time"} for line in metrics(stopped, stage)]
        assert numbers == [{k: v for k, v in line.items() if k != "time"} for line in metrics(whole, stage)]
    assert ": ema" in (whole.stage("ppo").ema_model / "README.md").read_text()
    assert (whole.stage("ppo").ema_model / "model.safetensors").read_bytes() != (
        whole.stage("ppo").model / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("ppo", [CUT, SHARED], ids=["tensor parallel", "sequence parallel"])
def test_ranks_that_share_samples_resume_exactly(tmp_path: Path, ppo: dict[str, Any]) -> None:
    whole, stopped = (make_run(tiny_spec(tmp_path / "whole", ppo=ppo, sft={}, reward={})), RunDir(tmp_path / "stopped"))
    run_chains([whole], 2)
    shutil.copytree(whole.path, stopped.path)
    shutil.rmtree(stopped.stage("ppo").path)
    assert run_stage(stopped, "ppo", 2, stop_after=1) == [75, 75], log_tail(stopped, "ppo")
    assert run_stage(stopped, "ppo", 2) == [0, 0], log_tail(stopped, "ppo")
    assert weights_digest(stopped, "ppo") == weights_digest(whole, "ppo")
    averaged, own = (whole.stage("ppo").ema_model / "model.safetensors", whole.stage("ppo").model / "model.safetensors")
    assert averaged.read_bytes() != own.read_bytes()
    assert averaged.stat().st_size == own.stat().st_size


def test_a_finished_stage_ends_at_once(plain: RunDir) -> None:
    before = list(Ledger(plain.ledger).events())
    assert run_stage(plain, "sft", 2) == [0, 0]
    assert list(Ledger(plain.ledger).events()) == before


def models_of(spec: JobSpec, **models: str) -> JobSpec:
    return JobSpec.model_validate({**spec.model_dump(mode="json"), "models": models})


def test_ppo_and_evaluation_score_with_a_finished_reward_model(plain: RunDir, tmp_path: Path) -> None:
    models = {"actor": str(plain.stage("sft").model), "reward": str(plain.stage("reward").model)}
    rewards = [{"model": "reward"}, {"format": ".*e.*", "weight": 0.5}]
    ppo = {"max_steps": 1, "rewards": rewards}
    raw = models_of(tiny_spec(tmp_path / "run", ranks=1, ppo=ppo), **models).model_dump(mode="json")
    raw["stages"]["eval"] = {"prompts": 4, "slurm": {"gpus_per_node": 0, "ranks_per_node": 1}}
    run = make_run(JobSpec.model_validate(raw))
    for stage in ("ppo", "eval"):
        assert run_stage(run, stage, 1) == [0], log_tail(run, stage)
    report = json.loads(run.stage("eval").report.read_text())
    assert report["models"]["ppo"]["reward"]["value"] is not None
    (line,) = train_lines(run, "ppo")
    assert line["reward"] == pytest.approx(line["reward/model"] + 0.5 * line["reward/format"], abs=1e-5)
    assert 0 < line["reward/format"] < 1
    # The reward stage goes on with its head.
    more = make_run(models_of(tiny_spec(tmp_path / "more", ranks=1, reward={"max_steps": 1, "lr": 1e-12}), **models))
    assert run_stage(more, "reward", 1) == [0], log_tail(more, "reward")
    before, after = (load_file(each.stage("reward").model / "model.safetensors") for each in (plain, more))
    torch.testing.assert_close(after["score.weight"], before["score.weight"], atol=1e-9, rtol=0)


def test_another_tokenizer_is_refused_before_any_stage_trains(plain: RunDir, tmp_path: Path) -> None:
    from tests.train import tiny

    other = tmp_path / "other"
    shutil.copytree(plain.stage("reward").model, other)
    tiny.tokenizer(300).save_pretrained(other)
    models = {"actor": str(plain.stage("sft").model), "reward": str(other)}
    run = make_run(models_of(tiny_spec(tmp_path / "run", ranks=1, sft={}, reward={}), **models))
    assert run_stage(run, "sft", 1) == [INPUT_WRONG], log_tail(run, "sft")
    failed = Ledger(run.ledger).last(Failed, "sft")
    assert failed is not None
    assert "its tokenizer differs from the actor's" in failed.message
    assert "Traceback" not in log_tail(run, "sft")


def test_a_stage_refuses_incomplete_inputs(plain: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(plain.path, copy.path)
    shutil.rmtree(copy.stage("ppo").path)
    weights = copy.stage("reward").model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run_stage(copy, "ppo", 2) == [1, 1]
    failed = Ledger(copy.ledger).last(Failed, "ppo")
    assert failed is not None
    assert "the model of stage reward is not complete" in failed.message
    assert not copy.stage("ppo").checkpoints.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"sources": [{"path": "{tmp}/pairs.jsonl", "format": "hh"}]}}, "no such data file"),
        ({"models": {"actor": "/nowhere/model"}}, "no tokenizer could be loaded"),
        ({"slurm": {"gpus_per_node": 0, "ranks_per_node": 2}}, "1 ranks were started where the plan has 2"),
    ],
)
def test_user_errors_found_on_the_node_are_reported_in_one_sentence(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    base = tiny_spec(tmp_path / "run", ranks=1, sft={}).model_dump(mode="json")
    base["stages"]["sft"].pop("slurm")
    pairs = tmp_path / "pairs.jsonl"  # deleted after the run is prepared, which looks at local data
    pairs.write_text(json.dumps({name: f"\n\nHuman: Hi\n\nAssistant: {name}" for name in ("chosen", "rejected")}))
    changed = json.loads(json.dumps({**base, **change}).replace("{tmp}", str(tmp_path)))
    run = make_run(type(tiny_spec(tmp_path / "run")).model_validate(changed))
    pairs.unlink()
    (code,) = run_stage(run, "sft", 1)
    failed = Ledger(run.ledger).last(Failed, "sft")
    assert failed is not None
    assert code == failed.exit_code in (1, 2)
    assert said in failed.message
    assert "Traceback" not in log_tail(run, "sft")


@pytest.mark.parametrize(
    ("stage", "reward", "why"),
    [
        ("grpo", {"function": "{tmp}/imports.py:score"}, "No module named 'a_package_that_nobody_has'"),
        ("grpo", {"function": "{tmp}/removed.py:score"}, "stages.grpo.rewards.0.function: cannot read"),
        ("ppo", {"url": "http://127.0.0.1:9", "secret": "NOT_SET"}, "the environment variable NOT_SET has no token"),
    ],
)
def test_rewards_that_cannot_work_are_refused_before_anything_loads(
    tmp_path: Path, stage: str, reward: dict[str, str], why: str
) -> None:
    for name, line in {"imports": "import a_package_that_nobody_has\n", "removed": ""}.items():
        (tmp_path / f"{name}.py").write_text(f"{line}def score(completions): ...\n")
    rewards = [{name: text.replace("{tmp}", str(tmp_path)) for name, text in reward.items()}]
    run = make_run(tiny_spec(tmp_path / "run", ranks=1, **{stage: {"rewards": rewards}}))
    for copy in run.scripts.rglob("removed.py"):
        copy.unlink()
    assert run_stage(run, stage, 1) == [INPUT_WRONG], log_tail(run, stage)
    failed = Ledger(run.ledger).last(Failed, stage)
    assert failed is not None
    assert why in failed.message
    assert "Traceback" not in log_tail(run, stage)
    assert not run.stage(stage).data.exists()
