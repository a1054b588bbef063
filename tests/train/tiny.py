"""Models of the four main architectures and some special ones, small enough for float32 on one thread."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("llama", "opt", "gpt2", "qwen2")
VOCABULARY = 96
PAD, BOS, EOS = 0, 1, 2
_LIKE_LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "cohere", "stablelm"), _LIKE_LLAMA),
    "nemotron": {**_LIKE_LLAMA, "head_dim": 8},
    **{kind: {**_LIKE_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2} for kind in ("mixtral", "gpt_oss")},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 24, "max_position_embeddings": 64, "dropout": 0.0,
    },
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip


def config(kind: str, **fields: Any) -> Any:
    from transformers import AutoConfig

    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return AutoConfig.for_model(kind, **{"vocab_size": VOCABULARY, **ids, **SIZES.get(kind, {}), **fields})


def causal(kind: str, seed: int = 0, spread: float = 0.2, **fields: Any) -> Any:
    """A language model in eval mode, with widely spread weights, so that its responses vary."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return _spread(AutoModelForCausalLM.from_config(config(kind, **fields)), spread)


def classifier(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A sequence classification model with one label, in eval mode."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    return _spread(AutoModelForSequenceClassification.from_config(config(kind, num_labels=1, **fields)))


def _spread(model: Any, spread: float = 0.2) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, spread)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def is_supported(precision: str) -> bool:
    """False for anything with fp16 in its name on a device on which DeepSpeed cannot train in float16."""
    from hpc_rlhf.train.parallel.deepspeed_import import supports_fp16

    return "fp16" not in precision or supports_fp16()


def skip_unless_supported(precision: str) -> None:
    """Skip a test that needs float16 where DeepSpeed cannot train in it."""
    import pytest

    if not is_supported(precision):
        pytest.skip("DeepSpeed has no float16 on this device (on a CPU it needs AVX512-FP16)")


def tokenizer(vocab_size: int = 300) -> Any:
    """A byte-level BPE tokenizer, trained on a few sentences."""
    from hpc_rlhf.train.models.tokenizers import train_bpe

    return train_bpe(iter(["\n\nHuman: What colour is grass?\n\nAssistant: Grass is green."] * 3), vocab_size)


def pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left for transformers' generate, and their mask, True on real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return ids, torch.arange(width) >= width - torch.tensor([[len(row)] for row in rows])
