"""Duration of a stage, by closed forms."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table
from pyarrow.parquet import write_table

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.model_time import MFU
from hpc_rlhf.estimate.parameters import architecture
from hpc_rlhf.estimate.sample_counts import expected_samples
from hpc_rlhf.estimate.stage_memory import stage_memory
from hpc_rlhf.estimate.stage_time import StageTime, chain_seconds, run_times, stage_time
from hpc_rlhf.spec.job import FromScratch, JobSpec, ModelsSpec
from hpc_rlhf.spec.source import SourceSpec
from tests.launch.specs import make_spec

COUNT = architecture(ModelsSpec(actor="facebook/opt-125m"), "actor").parameters
FLOPS = 312e12 * MFU
READ = 2 * COUNT / 2039e9 / 0.5  # seconds in which bf16 weights are read once


# Operations per token of a forward pass: those of the weights, and of causal attention in 12 layers of width 768, to
# half of the sequence on average.
ATTENTION = 4 * 12 * 768 * 512 / 2
FORWARD = 2 * COUNT + ATTENTION
PREFILL = (2 * COUNT + ATTENTION / 2) * 256 / FLOPS  # seconds for a prompt of half a sequence


def timed(name: str = "sft", gpus: int = 1, **fields: Any) -> dict[str, float]:
    slurm = {"gpu": "a100-80g", "gpus_per_node": gpus}
    return stage_time(make_spec("/scratch/demo", slurm, **{"reward": {}, name: fields}), name).parts


def test_training_takes_six_operations_a_weight_and_token_and_three_passes_of_attention() -> None:
    assert timed(micro_batch=8)["training"] == pytest.approx(3 * FORWARD * 8 * 512 / FLOPS + 3 * READ)
    twice = timed(micro_batch=4, global_batch=8)["training"]
    assert twice == pytest.approx(3 * FORWARD * 8 * 512 / FLOPS + 6 * READ)


def test_a_pipeline_waits_while_it_fills_and_drains() -> None:
    alone = timed(micro_batch=8, global_batch=64, zero=1)["training"]
    parts = timed(gpus=4, micro_batch=8, global_batch=64, zero=1, pipeline_parallel=4)
    assert parts["training"] == pytest.approx(alone / 4)
    assert parts["bubble"] / (parts["training"] + parts["bubble"]) == pytest.approx(3 / (8 + 3))
    hidden = 2 * 64 * 512 * 768  # bytes of the states of a step's tokens, which gradients follow back
    assert parts["messages"] == pytest.approx(2 * hidden / 300e9, rel=0.01)


def test_small_passes_are_bound_by_kernel_launches() -> None:
    assert timed(micro_batch=1)["training"] == pytest.approx(3 * 12 * 0.25e-3)


def test_adam_reads_and_writes_the_share_of_a_rank() -> None:
    whole = 28 * COUNT / 2039e9 / 0.5
    assert [timed(gpus=4, zero=zero)["optimizer"] for zero in (0, 1)] == pytest.approx([whole, whole / 4])
    assert "optimizer" not in timed(zero=2, offload_optimizer=True)


def test_checkpointing_adds_a_forward_pass_and_frozen_weights_save_half_the_backward_pass() -> None:
    tokens = 8 * 512
    again = timed(micro_batch=8, activation_checkpointing=True)["training"]
    assert again == pytest.approx(4 * FORWARD * tokens / FLOPS + 4 * READ)
    lora = timed(micro_batch=8, lora={"rank": 8})["training"]
    assert lora == pytest.approx((4 * COUNT + 3 * ATTENTION) * tokens / FLOPS + 2 * READ)


def test_chunked_mlps_are_computed_once_more_in_long_passes() -> None:
    """Three matrices of 1024 x 4096 in each of 4 layers."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
    spec = make_spec("/scratch/demo", {"gpu": "a100-80g", "gpus_per_node": 1}, sft={})
    model = FromScratch(from_scratch={"model_type": "llama", "vocab_size": 300, **sizes})

    def seconds(tokens: int, chunked: bool) -> float:
        sft = spec.stage("sft").model_copy(update={"micro_batch": tokens // 512, "chunked_mlp": chunked})
        stages = spec.stages.model_copy(update={"sft": sft})
        models = spec.models.model_copy(update={"actor": model})
        return stage_time(spec.model_copy(update={"models": models, "stages": stages}), "sft").parts["training"]

    assert seconds(8192, True) - seconds(8192, False) == pytest.approx(2 * 4 * 3 * 1024 * 4096 * 8192 / FLOPS)
    assert seconds(4096, True) == seconds(4096, False)


def test_a_pair_is_two_sequences_and_dpo_scores_with_its_reference() -> None:
    pairs = timed("dpo", micro_batch=4)
    assert pairs["training"] == pytest.approx(timed(micro_batch=8)["training"])
    assert pairs["scoring"] == pytest.approx(FORWARD * 8 * 512 / FLOPS + READ)


def test_communication_of_each_zero_stage() -> None:
    sent = [timed(gpus=2, micro_batch=1, global_batch=8, zero=zero)["messages"] for zero in range(4)]
    unit = COUNT * 0.5 / 300e9  # half of it goes to the other rank
    assert sent == [pytest.approx(factor * unit) for factor in (4, 6, 18, 24)]


def test_ranks_that_share_sequences_pass_their_tokens_on_twice_each_way() -> None:
    body, tokens = architecture(ModelsSpec(actor="facebook/opt-125m"), "actor"), 16 * 512
    parts = timed(gpus=2, micro_batch=16, sequence_parallel=2)
    assert parts["training"] == pytest.approx(3 * FORWARD * tokens / 2 / FLOPS + 3 * READ)
    gradients = 4 * COUNT * 0.5 / 300e9
    numbers = 2 * tokens / 2 * (2 * 12 * 768 + body.kv)  # of a rank, forward and backward
    assert parts["messages"] == pytest.approx(gradients + 2 * numbers * 0.5 / 300e9)
    over_nodes = stage_time(
        make_spec(
            "/scratch/demo", {"gpu": "a100-80g", "gpus_per_node": 1, "nodes": 2}, reward={},
            sft={"micro_batch": 16, "sequence_parallel": 2},
        ),
        "sft",
    ).parts  # fmt: skip
    assert over_nodes["messages"] == pytest.approx(gradients * 300 / 25 + 2 * numbers * 0.5 / 25e9)


def test_ranks_that_share_layers_sum_outputs_and_gradients() -> None:
    """Of two outputs and four inputs (queries, keys, values, MLP) of each layer, and of the embeddings and the head."""
    parts = timed(gpus=2, micro_batch=16, tensor_parallel=2)
    forward, backward = (2 * (sums * 12 + 1) * 16 * 512 * 768 for sums in (2, 4))  # bytes
    assert parts["messages"] == pytest.approx(2 * (forward + backward) * 0.5 / 300e9)
    again = timed(gpus=2, micro_batch=16, tensor_parallel=2, activation_checkpointing=True)
    assert again["messages"] == pytest.approx(2 * (2 * forward + backward) * 0.5 / 300e9)


def test_offload_waits_for_the_bus_and_the_cpu() -> None:
    none = timed(zero=3)
    offloaded = timed(zero=3, offload_optimizer=True, offload_params=True)
    assert "offload" not in none
    assert offloaded["offload"] == pytest.approx(COUNT * (4 / 25e9 + 28 / 200e9 + 4 / 25e9))


def test_decoding_is_bound_by_reading_the_weights_for_every_token() -> None:
    spec = make_spec("/scratch/demo", {"gpu": "a100-80g", "gpus_per_node": 1}, reward={}, ppo={"micro_batch": 1})
    body = architecture(ModelsSpec(actor="facebook/opt-125m"), "actor")
    cache = body.kv * 2 * (256 + 128) / 2039e9 / 0.5
    assert stage_time(spec, "ppo").parts["decoding"] == pytest.approx(256 * (READ + cache) + PREFILL)


def test_a_sharded_actor_too_large_to_gather_is_streamed_for_every_token() -> None:
    def decoding(gpu: str) -> float:
        slurm = {"gpu": gpu, "gpus_per_node": 2}
        spec = make_spec("/scratch/demo", slurm, reward={}, ppo={"micro_batch": 1, "zero": 3})
        large = spec.model_copy(update={"models": spec.models.model_copy(update={"actor": "facebook/opt-30b"})})
        return stage_time(large, "ppo").parts["decoding"]

    whole = 2 * architecture(ModelsSpec(actor="facebook/opt-30b"), "actor").parameters
    larger, smaller = (decoding("h200-141g"), decoding("h100-80g"))  # alike but for memory, of which half is used
    streamed = whole - 79.1 * 2**30 / 2
    read = whole * (1 / 3350e9 - 1 / 4800e9) / 0.5 * 256
    assert smaller - larger > 0.99 * 255 * streamed / 450e9 + read


def test_grpo_reads_each_prompt_once_for_its_group_and_passes_over_the_rollout_again() -> None:
    def parts(**fields: Any) -> dict[str, float]:
        return timed("grpo", micro_batch=8, rewards=[{"exact": "answer"}], **fields)

    pair, group = parts(group_size=2), parts(group_size=8)
    assert pair["decoding"] - group["decoding"] == pytest.approx((4 - 1) * PREFILL)
    assert group["training"] == pytest.approx(timed(micro_batch=8)["training"])
    assert parts(num_iterations=3, minibatches=2)["training"] == pytest.approx(6 * group["training"])
    one_pass = FORWARD * 8 * 512 / FLOPS + READ
    assert "scoring" not in group  # a single update needs only its own pass
    for passes, fields in ((1, {"kl_coef": 0.1}), (2, {"global_batch": 16, "num_iterations": 2})):
        assert parts(**fields)["scoring"] == pytest.approx(passes * one_pass)


def test_the_actor_scores_a_rollout_of_one_micro_batch_in_the_pass_that_it_learns_from() -> None:
    def passes(**fields: Any) -> float:
        one_pass = FORWARD * 8 * 512 / FLOPS + READ  # the reward model and the critic have a smaller head
        return timed("ppo", micro_batch=8, **fields)["scoring"] / one_pass

    assert passes() == pytest.approx(3, rel=0.01)
    assert passes(global_batch=16) == passes(minibatches=2) == pytest.approx(2 * 4, rel=0.01)
    assert passes(dropout=0.1) == pytest.approx(4, rel=0.01)


def test_a_step_of_grpo_takes_a_prompt_for_each_group() -> None:
    spec = make_spec(
        "/scratch/demo", {"gpu": "a100-80g"},
        grpo={"rewards": [{"exact": "answer"}], "global_batch": 16, "minibatches": 2, "epochs": 4},
    )  # fmt: skip
    time = stage_time(spec, "grpo")
    assert (time.expected, time.samples, time.steps) == (95, 32, 95 * 4 // 4)


def test_steps_follow_from_the_data_and_attempts_from_the_time_limit() -> None:
    slurm = {"gpu": "a100-80g", "gpus_per_node": 2, "time": "10:00"}
    spec = make_spec("/scratch/demo", slurm, sft={"epochs": 30_000}, reward={}, ppo={"max_steps": 3})
    times = run_times(spec)
    sft, ppo = times["sft"], times["ppo"]
    assert isinstance(sft, StageTime)
    assert isinstance(ppo, StageTime)
    assert (sft.expected, sft.steps) == (19, 19 * 30_000 // 8)
    assert sft.seconds is not None
    assert sft.attempts == int(sft.seconds // 600) + 1 > 1
    assert ppo.steps == 3
    assert sft.gpu_hours == pytest.approx(sft.seconds * 2 / 3600)
    assert chain_seconds(spec, times) == pytest.approx(sft.seconds + 3 * ppo.step_seconds)


def test_evaluations_during_training_take_time() -> None:
    slurm = {"gpu": "a100-80g", "gpus_per_node": 1}
    often = {"max_steps": 10, "eval_every": 2}
    spec = make_spec("/scratch/demo", slurm, sft=often, reward={}, ppo=often)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"sources": [SourceSpec(demo=200_000)]})})
    sft, ppo = stage_time(spec, "sft"), stage_time(spec, "ppo")
    assert sft.evaluations == pytest.approx(5 * 1024 * sft.parts["training"] / 3 / sft.samples)
    assert ppo.evaluations == pytest.approx(5 * 256 * (ppo.parts["scoring"] + ppo.parts["decoding"]) / ppo.samples)
    assert sft.seconds == pytest.approx(10 * sft.step_seconds + sft.evaluations)


def of_sources(*sources: dict[str, Any]) -> JobSpec:
    spec = make_spec("/scratch/demo", {"gpu": "h100-80g"}, sft={})
    return JobSpec.model_validate({**spec.model_dump(mode="json"), "data": {"sources": sources}})


def test_rows_of_local_files_are_counted_and_those_of_the_hub_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n' * 50)
    rows = {"path": str(tmp_path / "rows.jsonl"), "format": "text", "weight": 2}
    assert expected_samples(of_sources(rows), "sft") == 190
    assert expected_samples(of_sources({**rows, "path": str(tmp_path)}, {"demo": 100}), "sft") == 285
    hub = of_sources(rows, {"path": "Dahoas/rm-static", "format": "prompt-chosen-rejected"})
    time = stage_time(hub, "sft")
    assert (time.steps, time.seconds, time.attempts) == (None, None, None)
    assert time.per_thousand == pytest.approx(1000 / 8 * time.step_seconds)


def test_pretraining_is_estimated_like_fine_tuning_on_sequences_of_its_own_length(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word" * 512 * 160)
    fields: dict[str, Any] = {"micro_batch": 8, "global_batch": 8}
    text = {"sources": [{"path": str(tmp_path / "text.txt"), "format": "text"}], "held_out": 0.5}
    slurm = {"gpu": "a100-80g", "gpus_per_node": 1}
    spec = make_spec(
        "/scratch/demo",
        slurm,
        pretrain={**fields, **text, "sequence_length": 512},
        sft={**fields, "answer_only": False},
    )
    assert stage_time(spec, "pretrain").parts == stage_time(spec, "sft").parts
    assert stage_memory(spec, "pretrain").held == stage_memory(spec, "sft").held
    assert stage_time(spec, "pretrain").steps == 10
    longer = make_spec("/scratch/demo", slurm, pretrain={**fields, **text, "sequence_length": 1024})
    assert stage_time(longer, "pretrain").steps == 5
    assert stage_memory(longer, "pretrain").held > stage_memory(spec, "pretrain").held


def test_rows_are_counted_in_every_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(name: str, **fields: Any) -> int | None:
        path = name if "/" in name else str(tmp_path / name)
        return expected_samples(of_sources({"path": path, "format": "text", **fields}), "sft")

    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write('{"text": "a"}\n' * 100)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *[['a line\nand "another"']] * 100])
    write_table(Table.from_pydict({"text": ["a"] * 100}), tmp_path / "rows.parquet")
    assert [counted(f"rows.{kind}") for kind in ("jsonl.gz", "csv", "parquet")] == [95] * 3
    # One list of all rows would have to be read whole.
    (tmp_path / "rows.json").write_text("[]")
    assert counted("rows.json") is None
    # A hub data set is counted once it is in the cache.
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert counted("somebody/data") is None
    folder = tmp_path / "cache/huggingface/datasets/somebody___data/default/0.0.0/abc"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"splits": {"train": {"num_examples": 200}}}')
    assert counted("somebody/data") == 190
    assert counted("somebody/data", split="test") is None


def test_a_gpu_without_a_name_has_no_speed() -> None:
    spec = make_spec("/scratch/demo", {"gpu": "80G"}, sft={})
    with pytest.raises(HpcRlhfError, match=r"without the name of the GPU") as caught:
        stage_time(spec, "sft")
    assert "a100-80g" in str(caught.value)


def test_an_evaluation_runs_every_model_and_the_judge() -> None:
    slurm = {"gpu": "a100-80g", "gpus_per_node": 1}
    plain = {"micro_batch": 8}
    spec = make_spec("/scratch/demo", slurm, sft=plain, reward=plain, ppo=plain, eval={**plain, "prompts": 8})
    time = stage_time(spec, "eval")
    one = FORWARD * 8 * 512 / FLOPS + READ
    # SFT, PPO and the initial model, three times each; the reward model, with a smaller head, six times.
    assert time.parts["scoring"] == pytest.approx(15 * one, rel=0.01)
    alone = stage_time(make_spec("/scratch/demo", slurm, sft=plain, eval={**plain, "prompts": 8}), "eval")
    assert alone.parts["decoding"] == pytest.approx(time.parts["decoding"] * 2 / 3)
    assert (time.steps, time.samples) == (1, 8)
    times = run_times(spec)
    assert list(times) == ["sft", "reward", "ppo", "eval"]
