"""Memory of a stage, by closed forms. ``make plan-check`` compares it with measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.model_memory import Pass
from hpc_rlhf.estimate.parameters import architecture
from hpc_rlhf.estimate.stage_memory import Memory, run_memory, stage_memory
from hpc_rlhf.spec.gpus import gpu_bytes
from hpc_rlhf.spec.job import FromScratch, JobSpec, ModelsSpec
from hpc_rlhf.spec.sizes import MLP_TOKENS
from hpc_rlhf.spec.stages import SftSpec
from tests.launch.specs import make_spec

MODEL = architecture(ModelsSpec(actor="facebook/opt-125m"), "actor")
COUNT = MODEL.parameters
GPUS = {"gpus_per_node": 2}


def sft(slurm: dict[str, Any] | None = None, **fields: Any) -> Memory:
    return stage_memory(make_spec("/scratch/demo", {**GPUS, **(slurm or {})}, sft=fields), "sft")


def tokens(spec: JobSpec, micro: int) -> int:
    return micro * (spec.data.max_prompt_tokens + spec.data.max_answer_tokens)


def test_each_zero_stage_shards_one_more_part() -> None:
    none, first, second, third = (sft(zero=zero) for zero in range(4))
    assert none.always == {"weights": 2 * COUNT, "optimizer": 12 * COUNT}
    assert first.always == second.always == {"weights": 2 * COUNT, "optimizer": 6 * COUNT}
    assert third.always == {
        "weights": COUNT, "optimizer": 6 * COUNT, "gradients": COUNT, "buffers": 2 * COUNT,
    }  # fmt: skip


def test_gradients_overlap_activations_only_with_accumulation() -> None:
    once, often = sft(micro_batch=4, global_batch=8), sft(micro_batch=4, global_batch=16)
    assert once.phases["passes"]["gradients"] == 0
    assert often.phases["passes"]["gradients"] == 2 * COUNT
    assert once.phases["passes"]["activations"] == often.phases["passes"]["activations"]


def test_a_step_without_zero_copies_all_gradients_to_float32() -> None:
    assert sum(sft().phases["steps"].values()) == (2 + 4) * COUNT
    assert sum(sft(zero=2).phases["steps"].values()) == (2 + 4) * COUNT // 2
    assert sum(sft(precision="fp32").phases["steps"].values()) == (4 + 4) * COUNT


def test_a_gradient_buffer_has_at_most_deepspeeds_bucket_size() -> None:
    spec = make_spec("/scratch/demo", GPUS, sft={"zero": 2})
    models = spec.models.model_copy(update={"actor": "facebook/opt-1.3b"})
    large = stage_memory(spec.model_copy(update={"models": models}), "sft")
    assert large.phases["passes"]["buffers"] == 2 * 200_000_000
    assert large.phases["first reduction"]["buffers"] == 4 * 200_000_000
    assert sft(zero=2).phases["passes"]["buffers"] == 2 * COUNT


def test_precision_offload_and_1_bit_adam_change_the_optimizer() -> None:
    assert sft(precision="fp32").always["optimizer"] == 8 * COUNT
    assert sft(optimizer="onebit-adam").always["optimizer"] == 16 * COUNT
    assert sft(zero=2, offload_optimizer=True).always["optimizer"] == 0


def test_only_adapters_have_gradients_and_optimizer_states() -> None:
    memory = sft(lora={"rank": 8})
    adapters = memory.always["weights"] // 2 - COUNT
    assert 0 < adapters < COUNT / 20
    assert memory.always["optimizer"] == 12 * adapters
    assert memory.phases["steps"] == {"gradients": 2 * adapters, "gradients for the step": 4 * adapters}


def test_activations_grow_with_tokens_and_checkpointing_keeps_those_of_one_layer() -> None:
    def kept(**fields: Any) -> int:
        return sft(**fields).phases["passes"]["activations"]

    assert kept(micro_batch=8) == 2 * kept(micro_batch=4)
    assert kept(micro_batch=8, sequence_parallel=2) == kept(micro_batch=4)
    assert sft(zero=3, sequence_parallel=2).always == sft(zero=3).always
    # OPT keeps two norms with their inputs, queries, keys, values, attention's output and ReLU's for each token.
    spec = make_spec("/scratch/demo", GPUS, sft={})
    layer = 2 * (8 * 768 + 3072) + 4 * 12
    per_token = kept(micro_batch=4) / tokens(spec, 4)
    assert per_token == pytest.approx(12 * layer + 2 * 2 * 768, rel=0.02)
    again = kept(micro_batch=4, activation_checkpointing=True) / tokens(spec, 4)
    assert again == pytest.approx(12 * 2 * 768 + layer + 2 * 2 * 768, rel=0.2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunked_mlps_keep_nothing_and_recompute_one_part(checkpointing: bool) -> None:
    """Llama's MLP keeps four matrices of its inner width: what it gates, by what, that function, and their product."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
    models = ModelsSpec(actor=FromScratch(from_scratch={"model_type": "llama", "vocab_size": 300, **sizes}))
    model, long = architecture(models, "actor"), 4 * MLP_TOKENS

    def work(tokens: int, chunked: bool) -> Pass:
        fields = {"activation_checkpointing": checkpointing, "chunked_mlp": chunked}
        return Pass(model, SftSpec.model_validate(fields), tokens, 0)

    per_layer = 4 * 2 * 1024
    saved = work(long, False).activations - work(long, True).activations
    assert saved == (1 if checkpointing else 3) * per_layer * long
    assert work(long, True).backward == max(20 * 256 * long, (per_layer + 3 * 2 * 1024) * MLP_TOKENS)
    assert work(MLP_TOKENS, True).activations == work(MLP_TOKENS, False).activations


def test_logits_are_never_all_in_memory() -> None:
    def head(**fields: Any) -> int:
        return sft(**fields).phases["passes"]["logits"]

    whole = 4 * 50272 * tokens(make_spec("/scratch/demo", GPUS, sft={}), 64)
    assert head(micro_batch=64) < whole / 4
    assert head(micro_batch=64) - head(micro_batch=32) < 2 * 4 * 768 * whole / (4 * 50272)


def test_ppo_holds_four_models_and_gathers_a_sharded_actor() -> None:
    spec = make_spec("/scratch/demo", GPUS, reward={}, ppo={"zero": 3, "ema": True})
    memory = stage_memory(spec, "ppo")
    assert set(memory.always) == {"weights", "gradients", "buffers", "optimizer", "ref", "reward", "critic", "EMA"}
    assert memory.phases["rollouts"]["gathered actor"] == 2 * COUNT
    assert memory.always["EMA"] == 2 * COUNT
    assert {"passes", "the critic's passes", "rollouts", "scoring"} <= set(memory.phases)
    adapted = make_spec("/scratch/demo", GPUS, reward={}, ppo={"ema": True, "lora": {"rank": 8}})
    linear = sum(layer.inputs * layer.outputs * layer.count for layer in MODEL.linears)
    assert stage_memory(adapted, "ppo").always["EMA"] == pytest.approx(2 * linear, abs=8), "over two ranks"


def test_grpo_holds_a_reference_and_a_reward_model_only_if_it_uses_them() -> None:
    def parts(**fields: Any) -> set[str]:
        stages = {"reward": {}, "grpo": {"rewards": [{"exact": "answer"}], **fields}}
        memory = stage_memory(make_spec("/scratch/demo", GPUS, **stages), "grpo")
        assert {"passes", "rollouts", "scoring"} <= set(memory.phases)
        return set(memory.always)

    assert parts() == {"weights", "optimizer"}
    assert parts(kl_coef=0.001, ema=True) == {"weights", "optimizer", "ref", "EMA"}
    assert parts(kl_coef=0.001, lora={"rank": 8}) == {"weights", "optimizer"}, "adapters off are the reference"
    assert parts(rewards=[{"model": "reward"}, {"exact": "answer"}]) == {"weights", "optimizer", "reward"}


def test_an_evaluation_holds_one_model_at_a_time() -> None:
    spec = make_spec("/scratch/demo", GPUS, sft={}, reward={}, ppo={}, eval={"prompts": 64})
    memory = stage_memory(spec, "eval")
    assert memory.always == {"weights": 2 * COUNT}
    assert memory.phases["rollouts"]["KV cache"] == 32 * 2 * MODEL.kv * tokens(spec, 1)


def test_the_peak_is_at_the_fullest_moment() -> None:
    memory = Memory({}, {"weights": 5}, {"passes": {"logits": 2, "weights": 1}, "steps": {"gradients": 2}}, 10)
    assert (memory.fullest, memory.held, memory.left) == ("passes", 8, 2)
    assert memory.parts == {"weights": 6, "logits": 2}


def test_a_stage_may_fit_fit_tightly_or_not_fit() -> None:
    small = sft({"gpu": "1G"})
    assert small.left == 2**30 - small.held
    assert small.left < 0
    assert small.fits is False
    assert sft({"gpu": str(small.held + 1)}).fits is False  # nothing is left for CUDA
    assert sft({"gpu": str(small.held * 2)}).fits
    assert sft().fits is None


def test_an_unknown_model_leaves_the_other_stages_planned() -> None:
    spec = make_spec("/scratch/demo", sft={}, reward={})
    models = spec.models.model_copy(update={"reward": "nobody/knows-this"})
    memory = run_memory(spec.model_copy(update={"models": models}))
    assert isinstance(memory["reward"], HpcRlhfError)
    assert not isinstance(memory["sft"], HpcRlhfError)


def test_gpus_are_known_by_name_or_by_their_memory() -> None:
    assert gpu_bytes("80G") == 80 * 2**30
    assert gpu_bytes("a100-80g") < gpu_bytes("80G")
    with pytest.raises(ValueError, match="did you mean a100-80g"):
        gpu_bytes("A100-80gb")


def test_a_pipeline_divides_weights_and_keeps_the_activations_of_many_passes() -> None:
    """OPT's twelve layers on two stages: the embeddings of 768 x 50272 weights are on both."""
    fields = {"zero": 1, "micro_batch": 4, "pipeline_parallel": 2}
    embedding = MODEL.vocabulary * MODEL.hidden
    memory = sft({"gpus_per_node": 4}, global_batch=64, **fields)
    own = memory.parameters["its fullest stage"]
    assert own == pytest.approx((COUNT - embedding) / 2 + embedding, rel=1e-3)
    assert memory.always == {"weights": 2 * own, "optimizer": 6 * own}

    first, last = (
        replace(Pass(MODEL, SftSpec.model_validate(fields), 2048, 0), in_flight=passes).activations for passes in (2, 1)
    )
    assert first / last == pytest.approx(2, rel=0.1)
    with pytest.raises(HpcRlhfError, match="12 layers cannot be divided into 13 stages"):
        sft({"gpus_per_node": 13}, **{**fields, "pipeline_parallel": 13})


@pytest.mark.parametrize(
    ("fields", "split"),
    [
        ({"model_type": "llama", "tie_word_embeddings": False}, ("embeddings", "head")),
        ({"model_type": "llama", "tie_word_embeddings": True}, ("embeddings",)),
        ({"model_type": "llama", "vocab_size": 1001}, ()),
        (
            {"model_type": "gemma2", "head_dim": 32},
            (),
        ),  # it changes its logits, and its embeddings are tied to the head
        ({"model_type": "granite", "tie_word_embeddings": False, "logits_scaling": 2.0}, ("embeddings",)),
    ],
)
def test_tensor_parallelism_divides_what_it_splits(fields: dict[str, Any], split: tuple[str, ...]) -> None:
    sizes = {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    models = {"actor": {"from_scratch": {**sizes, **fields}}}
    spec = make_spec("/scratch/demo", GPUS, sft={"tensor_parallel": 2}).model_dump(mode="json")
    spec = JobSpec.model_validate({**spec, "models": models})
    model = architecture(spec.models, "actor")
    divided = model.inside + len(split) * 1000 * 64
    assert stage_memory(spec, "sft").always["weights"] == 2 * (model.parameters - divided // 2)
