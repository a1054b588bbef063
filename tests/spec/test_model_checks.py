"""What is wrong with a spec's models is found from their files, before anything trains."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec.load import load_spec

Write = Callable[..., str]
TWO = {"0": "LABEL_0", "1": "LABEL_1"}
KINDS = ("llama", "qwen3", "mistral")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model's folder without weights, or with the headers of some."""

    def one(
        name: str, fields: dict[str, Any] | None = None, tensors: dict[str, list[int]] | None = None,
        tokenizer: dict[str, Any] | None = None, pad: str = "<pad>",
    ) -> str:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(fields or {})}))
        if tensors is not None:
            header = {key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]} for key, shape in tensors.items()}
            text = json.dumps(header).encode()
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.5))
        if tokenizer is not None:
            for file, content in (tokenizer if "vocab.json" in tokenizer else {"tokenizer.json": tokenizer}).items():
                (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
            (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad, "eos_token": "</s>"}))
        return str(folder)

    return one


def problems(tmp_path: Path, models: dict[str, str], stages: str) -> list[str]:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"name: x\nrun_dir: run\ndata: {{sources: [{{demo: 100}}]}}\nstages: {{{stages}}}\nmodels:\n"
        + "".join(f"  {name}: {ref}\n" for name, ref in models.items())
    )
    try:
        load_spec(path)
    except SpecError as error:
        return [f"{problem.line}: {problem.path}: {problem.what}" for problem in error.problems]
    return []


def scored(kind: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    name = f"{kind.capitalize()}ForSequenceClassification"
    return {"model_type": kind, "architectures": [name], "id2label": labels or {"0": "LABEL_0"}}


@pytest.mark.parametrize(
    "method", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"quant_method": "fp8"}, {"bits": 4}]
)
@pytest.mark.parametrize("within", [None, "text_config"])
@pytest.mark.parametrize("role", ["actor", "reward"])
def test_quantized_models_are_refused(
    tmp_path: Path, write: Write, method: dict[str, Any], within: str | None, role: str
) -> None:
    fields: dict[str, Any] = {"quantization_config": method}
    models = {"actor": write("plain"), role: write("small", {within: fields} if within else fields)}
    (said,) = problems(tmp_path, models, "sft: {}, reward: {}")
    how = f" ({method['quant_method']})" if "quant_method" in method else ""
    line = 6 + list(models).index(role)
    assert said == f"{line}: models.{role}: its weights are quantized{how}, and quantized weights cannot be trained"


def test_a_model_in_the_hubs_cache_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "hub/models--acme--small"
    (stored / "snapshots/abc").mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text("abc")
    (stored / "snapshots/abc/config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "quantized (gptq)" in problems(tmp_path, {"actor": "acme/small"}, "sft: {}")[0]
    assert problems(tmp_path, {"actor": "acme/unknown"}, "sft: {}") == []


def test_an_encoder_or_a_reward_model_is_no_actor(tmp_path: Path, write: Write) -> None:
    encoder = write("encoder", {"model_type": "t5", "is_encoder_decoder": True})
    assert "only decoders are trained" in problems(tmp_path, {"actor": encoder}, "sft: {}")[0]
    reward = write("reward", scored("llama"))
    assert "it is a reward model, not a language model" in problems(tmp_path, {"actor": reward}, "sft: {}")[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}},
        {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}},
        {"model_type": "chatglm", "architectures": ["ChatGLMModel"]},
        {"model_type": "vit"},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
    ],
)
@pytest.mark.parametrize("role", ["actor", "reward"])
def test_models_without_a_language_model_are_refused(
    tmp_path: Path, write: Write, fields: dict[str, Any], role: str
) -> None:
    models = {"actor": "acme/x", role: write("small", fields)}
    (found,) = problems(tmp_path, models, "sft: {}, reward: {}")
    assert f"models.{role}: " in found
    assert "transformers has no causal language model of type" in found or "it is an encoder" in found


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "llama4", "mistral3", "llava"])
def test_models_of_images_and_text_are_accepted_for_their_text_model(tmp_path: Path, write: Write, kind: str) -> None:
    text = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "llama4": "llama4_text", "mistral3": "mistral"}
    whole = {"model_type": kind, "text_config": {"model_type": text.get(kind, "llama")}, "vision_config": {}}
    assert problems(tmp_path, {"actor": write("whole", whole)}, "sft: {}, reward: {}, ppo: {}") == []


# What is wrong with a model, by the field that would divide it among eight ranks.
UNDIVIDED: dict[str, list[tuple[dict[str, Any], str | None]]] = {
    "sequence_parallel": [
        ({"num_attention_heads": 12}, "its 12 attention heads cannot be divided by sequence_parallel: 8"),
        ({"model_type": "gpt2", "n_head": 12}, "its 12 attention heads cannot be divided"),
        ({"text_config": {"model_type": "llama4_text", "layer_types": ["chunked_attention"]}}, "chunked_attention"),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "dynamic"}, "max_position_embeddings": 64}, "rotary embedding of llama models"),
        ({"num_attention_heads": 32, "num_key_value_heads": 4, "sliding_window": 64}, None),
    ],
    "tensor_parallel": [
        ({"num_attention_heads": 12}, "its 12 attention heads cannot be divided among 8 ranks (tensor_parallel: 8)"),
        ({"num_attention_heads": 32, "num_key_value_heads": 4}, "its 4 key and value heads"),
        ({"model_type": "opt", "num_attention_heads": 16, "ffn_dim": 100}, "its 100 feed-forward units"),
        (
            {"model_type": "cohere", "use_qk_norm": True},
            "tensor_parallel does not support cohere models with use_qk_norm",
        ),
        ({"model_type": "gemma4_text", "num_global_key_value_heads": 4}, "its 4 key and value heads of some layers"),
        ({"model_type": "gpt_oss"}, "tensor_parallel does not support gpt_oss models"),
        ({"model_type": "mixtral", "num_local_experts": 12}, "its 12 experts cannot be divided among 8 ranks"),
        ({"model_type": "mixtral", "num_local_experts": 8}, None),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_attention_heads": 4}}, "its 4 att"),
        ({"model_type": "phi3", "num_attention_heads": 12, "intermediate_size": 8192}, None),
        ({"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}, None),
    ],
}


@pytest.mark.parametrize(
    ("field", "fields", "complaint"), [(field, *each) for field, models in UNDIVIDED.items() for each in models]
)
def test_models_that_ranks_cannot_share_are_refused(
    tmp_path: Path, write: Write, field: str, fields: dict[str, Any], complaint: str | None
) -> None:
    stages = f"sft: {{{field}: 8, slurm: {{gpus_per_node: 8}}}}, reward: {{}}"
    found = problems(tmp_path, {"actor": write("model", fields)}, stages)
    if complaint is None:
        assert not found
        return
    assert found[0].startswith(f"4: stages.sft.{field}: models.actor: ")
    assert complaint in found[0]
    assert len(found) == 1


RECOMPUTED = {
    "activation_checkpointing": (["ctrl", "jetmoe", "openai-gpt"], "{} models cannot recompute activations"),
    "chunked_mlp": (["opt", "mixtral", "bloom"], "the MLPs of {} models cannot take a pass part by part"),
}


@pytest.mark.parametrize(
    ("field", "kind", "complaint"),
    [(field, kind, text.format(kind)) for field, (kinds, text) in RECOMPUTED.items() for kind in kinds],
)
def test_models_that_cannot_recompute_are_refused(
    tmp_path: Path, write: Write, field: str, kind: str, complaint: str
) -> None:
    on = f"{{{field}: true}}"
    other, plain = write("other", {"model_type": kind}), write("plain", {"model_type": "llama"})
    for models, stages, stage in (
        ({"actor": other}, f"sft: {on}, reward: {{}}", "sft"),
        ({"actor": other}, f"reward: {on}", "reward"),
        ({"actor": plain, "reward": other}, f"sft: {on}, reward: {on}", "reward"),
        ({"actor": plain, "reward": other}, f"reward: {{}}, ppo: {{critic: {on}}}", "ppo.critic"),
    ):
        (problem,) = problems(tmp_path, models, stages)
        assert problem.endswith(f"stages.{stage}.{field}: {complaint}")
    from_scratch = {"actor": f"{{from_scratch: {{model_type: {kind}, vocab_size: 300}}}}"}
    assert len(problems(tmp_path, from_scratch, f"sft: {on}")) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", ["reward: {}", "ppo: {}", "sft: {}, eval: {}", "reward: {}, ppo: {}"])
def test_a_reward_model_has_one_label(tmp_path: Path, write: Write, kind: str, stages: str) -> None:
    one = write("one", scored(kind), {"score.weight": [1, 8]})
    assert problems(tmp_path, {"actor": "acme/x", "reward": one}, stages) == []
    by_config = write("config", scored(kind, TWO))
    by_default = write("default", {**scored(kind), "id2label": None})
    by_weights = write("weights", {"model_type": kind}, {"v_head.weight": [2, 8]})
    for wrong in (by_config, by_default, by_weights):
        (said,) = problems(tmp_path, {"actor": "acme/x", "reward": wrong}, stages)
        assert said == "7: models.reward: it scores 2 labels, one is needed"
    assert problems(tmp_path, {"actor": "acme/x", "reward": by_config}, "dpo: {}") == [], "nothing asks it"


def test_labels_of_a_language_model_mean_nothing(tmp_path: Path, write: Write) -> None:
    fields = {"architectures": ["LlamaForCausalLM"], "id2label": TWO, "num_labels": 2}
    models = {"actor": "acme/x", "reward": write("base", fields, {"lm_head.weight": [300, 8]})}
    assert problems(tmp_path, models, "reward: {}, ppo: {}") == []


def test_ppo_needs_a_reward_model(tmp_path: Path, write: Write) -> None:
    needed = "4: stages.ppo: needs the reward stage, or a finished reward model in models.reward"
    assert problems(tmp_path, {"actor": "acme/x"}, "ppo: {}") == [needed]
    new = {"reward": "{from_scratch: {model_type: llama, vocab_size: 300}}"}
    assert problems(tmp_path, {"actor": "acme/x", **new}, "ppo: {}") == [needed]
    assert problems(tmp_path, {"actor": "acme/x", "reward": "acme/unknown"}, "ppo: {}") == []
    base = write("base", {"architectures": ["LlamaForCausalLM"]}, {"lm_head.weight": [300, 8]})
    (problem,) = problems(tmp_path, {"actor": "acme/x", "reward": base}, "ppo: {}")
    assert problem == "7: models.reward: it has no score head, but ppo needs a finished reward model"
    (Path(base) / "model.safetensors").rename(Path(base) / "pytorch_model.bin")  # only torch reads it
    assert problems(tmp_path, {"actor": "acme/x", "reward": base}, "ppo: {}") == []


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": "dynamic"},
        {"rope_scaling": {"rope_type": "dynamic"}, "max_position_embeddings": "x"},
        {"architectures": 3},
        {"architectures": [None]},
    ],
)
def test_fields_of_unknown_kinds_are_left_to_transformers(tmp_path: Path, write: Write, fields: dict[str, Any]) -> None:
    assert problems(tmp_path, {"actor": write("actor", fields)}, "sft: {}, reward: {}, ppo: {}") == []


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"score.0.weight": [8, 8], "score.2.weight": [1, 8]}, "its score head is not one linear layer"),
        ({"regression_layer.weight": [19, 8]}, "it scores 19 labels"),
        ({"model.embed_tokens.weight": [300, 8]}, "its weights have no score head"),
        (
            {
                "model.norm.weight": [8],
                "model.norm.bias": [8],
                "head.dense.weight": [8, 8],
                "classifier.weight": [1, 8],
            },
            "its score head is not one linear layer (classifier.weight, head)",
        ),
        ({"v_head.summary.weight": [1, 8], "v_head.summary.bias": [1], "lm_head.weight": [300, 8]}, None),
        ({"score.weight": [1, 8], "model.layers.0.mlp.gate.e_score_correction_bias": [4]}, None),
    ],
)
def test_heads_are_known_by_their_weights(
    tmp_path: Path, write: Write, tensors: dict[str, list[int]], said: str | None
) -> None:
    reward = write("reward", scored("llama"), tensors)
    found = problems(tmp_path, {"actor": "acme/x", "reward": reward}, "ppo: {}")
    assert (said in found[0]) if said else not found


def bpe(*words: str, added: tuple[str, ...] = (), merges: list[Any] | None = None, first: int = 0) -> dict[str, Any]:
    vocabulary = {word: first + number for number, word in enumerate(words)}
    more = [{"id": first + len(words) + number, "content": token} for number, token in enumerate(added)]
    return {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges or []}, "added_tokens": more}


def files(*words: str, merges: str = "") -> dict[str, Any]:
    """As vocab.json and merges.txt."""
    return {"vocab.json": {word: number for number, word in enumerate(words)}, "merges.txt": f"#version: 0.2\n{merges}"}


def unigram(*words: str) -> dict[str, Any]:
    return {"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in words]}}


@pytest.mark.parametrize(
    ("actor", "reward", "said"),
    [
        (bpe("a", "b"), bpe("b", "a"), "'a' is number 0 in the actor's and is number 1 in the other"),
        (bpe("a", "b"), bpe("a", "c"), "'b' is number 1 in the actor's and does not exist in the other"),
        (bpe("a"), bpe("a", first=1), "'a' is number 0"),
        (unigram("a", "b"), unigram("a", "c"), "'b' is number 1"),
        (unigram("a", "b"), bpe("a", "b"), None),
        (bpe("a", added=("<|im_start|>",)), bpe("a"), "'<|im_start|>' is number 1"),
        (bpe("a", "b", "ab", merges=["a b"]), bpe("a", "b", "ab", merges=[["b", "a"]]), "split words differently"),
        (bpe("a", "b", "ab", merges=["a b"]), bpe("a", "b", "ab", merges=[["a", "b"]]), None),
        (bpe("a"), bpe("a", added=("[PAD]", "<extra>")), None),
        (files("a", "b"), files("a", "c"), "'b' is number 1"),
        (bpe("a", "b"), files("b", "a"), "'a' is number 0"),
        (files("a", "b"), bpe("a", "b"), None),
        (files("a", "b", "ab", merges="a b\n"), files("a", "b", "ab", merges="b a\n"), "split words differently"),
        (files("a", "b", "ab", merges="a b\n"), bpe("a", "b", "ab", merges=["a b"]), None),
        (bpe("a", added=("<pad>",)), bpe("a", added=("[PAD]",)), None),
    ],
)  # fmt: skip
def test_tokenizers_are_compared(
    tmp_path: Path, write: Write, actor: dict[str, Any], reward: dict[str, Any], said: str | None
) -> None:
    """Only a padding token, or more tokens of the reward model, may differ."""
    models = {"actor": write("actor", tokenizer=actor), "reward": write("reward", tokenizer=reward, pad="[PAD]")}
    found = problems(tmp_path, models, "sft: {}, reward: {}, ppo: {}")
    if said is None:
        assert found == []
    else:
        (only,) = found
        assert only.startswith("7: models.reward: its tokenizer differs from the actor's: ")
        assert said in only
    assert problems(tmp_path, models, "sft: {}, dpo: {}") == [], "no stage uses the reward model"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("phi3", {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 500}),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 500}}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 500}),
        ("gemma3", {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}},
                                    "max_position_embeddings": 500}}),
    ],
)  # fmt: skip
def test_a_rotary_embedding_that_changes_within_a_rollout(
    tmp_path: Path, write: Write, kind: str, fields: dict[str, Any]
) -> None:
    models = {"actor": write("actor", {"model_type": kind, "max_position_embeddings": 2000, **fields})}
    (problem,) = problems(tmp_path, models, "sft: {}, reward: {}, ppo: {}")
    assert "models.actor: its rotary embedding changes at 500 tokens, but prompt and response may have 512" in problem
    assert not problems(tmp_path, models, "sft: {}, dpo: {}")


def test_a_pipeline_has_no_more_stages_than_the_model_has_layers(tmp_path: Path, write: Write) -> None:
    models = {"actor": write("actor", {"num_hidden_layers": 3})}
    stages = "sft: {zero: 1, pipeline_parallel: %d, slurm: {nodes: %d}}"
    assert problems(tmp_path, models, stages % (3, 3)) == []
    (problem,) = problems(tmp_path, models, stages % (4, 4))
    assert problem == "4: stages.sft.pipeline_parallel: the model's 3 layers cannot be divided into 4 stages"
