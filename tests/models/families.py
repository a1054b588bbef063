"""A tiny configuration of each family of language models, for `make models` and docs/models.md.

The widths are as small as the architectures allow. Windows are shorter than the longest sequence of the checks, and
layers alternate between the kinds that a family has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

VOCABULARY = 320
WINDOW = 8
CONTEXT = 256
# Rotary embeddings that change with the length do so between the longest response and the longest sequence.
SWITCH = 55
Fields = dict[str, Any]

# Fields by the names that most families use, GPT-2's and those of its relatives.
SIZES: Fields = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
SHARED: Fields = {**SIZES, "num_key_value_heads": 2}
GPT: Fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
WINDOWED: Fields = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FOUR_EXPERTS: Fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS: Fields = {"num_local_experts": 4, "num_experts_per_tok": 2}
# DeepSeek's latent attention, routed and shared experts.
LATENT: Fields = {
    **SIZES, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
ROUTED: Fields = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1,
}  # fmt: skip
DENSE_THEN_SPARSE: Fields = {"mlp_layer_types": ["dense", "sparse"]}
INDEXED: Fields = {
    "index_topk": 4, "index_head_dim": 16, "index_n_heads": 16, "layer_types": ["indexed_attention"] * 2,
}  # fmt: skip
# Gated delta rule in every other layer.
DELTA: Fields = {
    **SHARED, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA: Fields = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
GRANITE: Fields = {
    "embedding_multiplier": 2.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
}  # fmt: skip
ROPE: Fields = {"rope_theta": 10000.0}
GEMMA: Fields = {**SHARED, "head_dim": 16}
# What looks at images beside a multimodal model's text model.
IMAGES: Fields = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
BLOCKS: Fields = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}


@dataclass(frozen=True)
class Family:
    """A tiny configuration, by the fields of its config.json, and models of the family that people know.

    Attributes:
        noise: whether the configuration takes dropout.
        spread: the weights' standard deviation; a smaller one where float32 would be too coarse.
    """

    known: str
    fields: Fields
    noise: bool = True
    spread: float = 0.3


def _of(kind: str, known: str, *fields: Fields, **more: Any) -> Family:
    merged: Fields = {"model_type": kind, "vocab_size": VOCABULARY}
    for each in (*fields, more):
        merged |= each
    return Family(known, merged)


def _multimodal(kind: str, known: str, text: Family, vision: Fields | None = None) -> Family:
    return Family(known, {"model_type": kind, "text_config": text.fields, "vision_config": vision})


_GEMMA3 = _of("gemma3_text", "Gemma 3 270M, 1B", GEMMA, WINDOWED, query_pre_attn_scalar=16)
_GEMMA3N = _of(
    "gemma3n_text", "Gemma 3n E2B, E4B", GEMMA, num_hidden_layers=4, num_kv_shared_layers=2, intermediate_size=[48] * 4,
    vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, laurel_rank=8, sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
)  # fmt: skip
_GEMMA4 = _of(
    "gemma4_text", "Gemma 4", GEMMA, WINDOWED, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
    global_head_dim=16,
)  # fmt: skip
_LLAMA4 = _of(
    "llama4_text", "Llama 4 Scout, Maverick", SHARED, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
    num_experts_per_tok=1, attention_chunk_size=WINDOW,
)  # fmt: skip
_MISTRAL = _of("mistral", "Mistral 7B v0.1, Zephyr", SHARED, head_dim=8, sliding_window=WINDOW)
_MINISTRAL3 = _of("ministral3", "Ministral 3 3B, 8B, 14B", SHARED, head_dim=8)
_QWEN35 = _of("qwen3_5_text", "Qwen 3.5 0.8B to 27B", DELTA)
_QWEN35_MOE = _of("qwen3_5_moe_text", "Qwen 3.5 35B-A3B", DELTA, FOUR_EXPERTS, shared_expert_intermediate_size=32)

FAMILIES: dict[str, Family] = {
    "llama": _of("llama", "Llama 2, Llama 3, TinyLlama, SmolLM, Yi, DeepSeek LLM", SHARED),
    "llama: tied embeddings": _of("llama", "Llama 3.2 1B, 3B", SHARED, tie_word_embeddings=True),
    "llama: rope llama3": _of(
        "llama", "Llama 3.1, 3.2, 3.3", SHARED,
        rope_parameters={
            **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama: rope dynamic": _of(
        "llama", "Llama with dynamic NTK scaling", SHARED, max_position_embeddings=SWITCH,
        rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 4.0},
    ),
    "llama: biases": _of("llama", "InternLM 2", SHARED, attention_bias=True, mlp_bias=True),
    "mistral": _MISTRAL,
    "ministral": _of("ministral", "Ministral 8B", SHARED, WINDOWED, head_dim=8),
    "ministral3": _MINISTRAL3,
    "mixtral": _of("mixtral", "Mixtral 8x7B, 8x22B", SHARED, LOCAL_EXPERTS),
    "qwen2": _of("qwen2", "Qwen 1.5, Qwen 2, Qwen 2.5, QwQ", SHARED),
    "qwen2: sliding window": _of(
        "qwen2", "Qwen 2 with its window on", SHARED, use_sliding_window=True, sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen2_moe": _of(
        "qwen2_moe", "Qwen 1.5 MoE, Qwen 2 57B-A14B", SHARED, FOUR_EXPERTS, shared_expert_intermediate_size=32,
    ),
    "qwen3": _of("qwen3", "Qwen 3 0.6B to 32B", SHARED, head_dim=16),
    "qwen3_moe": _of("qwen3_moe", "Qwen 3 30B-A3B, 235B-A22B", SHARED, FOUR_EXPERTS, head_dim=16),
    "qwen3_next": _of("qwen3_next", "Qwen 3 Next 80B-A3B", DELTA, FOUR_EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": _QWEN35_MOE,
    "gemma": _of("gemma", "Gemma 2B, 7B", GEMMA),
    "gemma2": _of("gemma2", "Gemma 2 2B, 9B, 27B", GEMMA, WINDOWED, query_pre_attn_scalar=16),
    "gemma2: low caps": _of(
        "gemma2", "Gemma 2, caps within reach of tiny weights", GEMMA, WINDOWED, query_pre_attn_scalar=4,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    "gemma3_text": _GEMMA3,
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _GEMMA4,
    "vaultgemma": _of("vaultgemma", "VaultGemma 1B", GEMMA, WINDOWED, query_pre_attn_scalar=16),
    "recurrent_gemma": _of(
        "recurrent_gemma", "RecurrentGemma 2B, 9B", SIZES, num_hidden_layers=3, attention_window_size=WINDOW,
    ),
    "phi": _of("phi", "Phi-1.5, Phi-2", SHARED, partial_rotary_factor=0.5),
    "phi3": _of("phi3", "Phi-3 mini 4k, Phi-4", SHARED, sliding_window=None),
    "phi3: sliding window": _of("phi3", "Phi-3 mini with its window", SHARED, sliding_window=WINDOW),
    "phi3: rope longrope": _of(
        "phi3", "Phi-3 and Phi-3.5 mini 128k, Phi-4 mini", SHARED, sliding_window=None,
        original_max_position_embeddings=SWITCH,
        rope_parameters={
            **ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": SWITCH,
        },
    ),
    "phimoe": _of("phimoe", "Phi-3.5 MoE, Phi-mini-MoE", SHARED, LOCAL_EXPERTS),
    "opt": _of(
        "opt", "OPT 125M, 1.3B to 66B", SIZES, ffn_dim=48, word_embed_proj_dim=32,
    ),
    "opt: norm after": _of(
        "opt", "OPT 350M", SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False,
    ),
    "gpt2": _of("gpt2", "GPT-2, DistilGPT-2, DialoGPT", GPT),
    "gpt2: scaled by layer": _of("gpt2", "Mistral's GPT-2 (Stanford)", GPT, scale_attn_by_inverse_layer_idx=True),
    "gpt2: no scale": _of("gpt2", "ImageGPT-like GPT-2", GPT, scale_attn_weights=False),
    "openai-gpt": _of("openai-gpt", "GPT (2018)", GPT),
    "gpt_neo": _of(
        "gpt_neo", "GPT-Neo 125M to 2.7B", SIZES, num_layers=2, num_heads=4, window_size=WINDOW,
        attention_types=[[["global", "local"], 1]],
    ),
    "gptj": _of("gptj", "GPT-J 6B", GPT, rotary_dim=4),
    "gpt_neox": _of("gpt_neox", "Pythia, GPT-NeoX 20B, Dolly 2", SIZES),
    "gpt_neox_japanese": _of("gpt_neox_japanese", "Japanese GPT-NeoX 2.7B", SIZES, intermediate_multiple_size=2),
    "gpt_bigcode": _of("gpt_bigcode", "StarCoder, SantaCoder", GPT),
    "gpt_oss": _of("gpt_oss", "gpt-oss 20B, 120B", SHARED, LOCAL_EXPERTS, WINDOWED, head_dim=16),
    "codegen": _of("codegen", "CodeGen 350M to 16B", GPT, rotary_dim=4),
    "ctrl": _of("ctrl", "CTRL", GPT, dff=48),
    "bloom": _of("bloom", "BLOOM, BLOOMZ", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": _of("mpt", "MPT 7B, 30B", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT}),
    "falcon": _of("falcon", "Falcon 7B", SIZES, new_decoder_architecture=False, multi_query=True, alibi=False),
    "falcon: new decoder": _of("falcon", "Falcon 40B, 180B", SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "falcon: alibi": _of("falcon", "Falcon-RW 1B", SIZES, alibi=True, bias=True),
    "falcon_h1": _of("falcon_h1", "Falcon-H1 0.5B to 34B", SHARED, MAMBA, mamba_d_ssm=64),
    "falcon_mamba": _of("falcon_mamba", "Falcon Mamba 7B", SIZES, state_size=8),
    "olmo": _of("olmo", "OLMo 1B, 7B", SHARED),
    "olmo2": _of("olmo2", "OLMo 2", SHARED),
    "olmo3": _of("olmo3", "OLMo 3 7B, 32B", SHARED, WINDOWED),
    "olmo_hybrid": _of("olmo_hybrid", "OLMo Hybrid 7B", DELTA, linear_num_key_heads=4),
    "olmoe": _of("olmoe", "OLMoE 1B-7B", SHARED, FOUR_EXPERTS),
    "flex_olmo": _of("flex_olmo", "FlexOlmo 7x7B", SHARED, FOUR_EXPERTS),
    "stablelm": _of("stablelm", "StableLM 3B, Zephyr 1.6B", SHARED, partial_rotary_factor=0.25),
    "stablelm: parallel": _of(
        "stablelm", "StableLM 2 12B", SHARED, partial_rotary_factor=0.25, use_parallel_residual=True, qk_layernorm=True,
        use_qkv_bias=True,
    ),
    "deepseek_v2": _of("deepseek_v2", "DeepSeek V2, V2 Lite", LATENT, ROUTED, first_k_dense_replace=1),
    "deepseek_v3": _of("deepseek_v3", "DeepSeek V3, R1, Kimi K2, Moonlight", LATENT, ROUTED, first_k_dense_replace=1),
    "deepseek_v32": _of("deepseek_v32", "DeepSeek V3.2", LATENT, ROUTED, INDEXED, DENSE_THEN_SPARSE),
    "granite": _of("granite", "Granite 3 2B, 8B", SHARED, GRANITE),
    "granitemoe": _of("granitemoe", "Granite 3 1B-A400M, 3B-A800M", SHARED, LOCAL_EXPERTS, GRANITE),
    "granitemoeshared": _of(
        "granitemoeshared", "Granite MoE with shared experts", SHARED, LOCAL_EXPERTS, GRANITE,
        shared_intermediate_size=32,
    ),
    "granitemoehybrid": _of(
        "granitemoehybrid", "Granite 4.0 H Tiny, Small", SHARED, LOCAL_EXPERTS, GRANITE, MAMBA,
        shared_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bamba": _of("bamba", "Bamba 9B", SHARED, MAMBA, attn_layer_indices=[1]),
    "cohere": _of("cohere", "Command R, Aya 23", SHARED, logit_scale=0.0625),
    "cohere2": _of("cohere2", "Command R7B, Command A", SHARED, WINDOWED, logit_scale=0.0625, head_dim=8),
    "glm": _of("glm", "GLM-4 9B, GLM Edge", SHARED, head_dim=8),
    "glm4": _of("glm4", "GLM-4 0414 9B, 32B", SHARED, head_dim=8),
    "glm4_moe": _of("glm4_moe", "GLM-4.5, 4.6", SHARED, ROUTED, head_dim=8, first_k_dense_replace=1),
    "glm4_moe_lite": _of("glm4_moe_lite", "GLM-4.7 Flash", LATENT, ROUTED, DENSE_THEN_SPARSE, n_group=1),
    "glm_moe_dsa": _of("glm_moe_dsa", "GLM-5", LATENT, ROUTED, INDEXED, DENSE_THEN_SPARSE, n_group=1),
    "nemotron": _of("nemotron", "Nemotron 4, Minitron", SHARED),
    "nemotron_h": _of(
        "nemotron_h", "Nemotron-H, Nemotron Nano 2", SHARED, layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8, head_dim=8, chunk_size=16,
    ),
    "nemotron_h: experts": _of(
        "nemotron_h", "Nemotron 3 Nano", SHARED, ROUTED, layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8, head_dim=8, chunk_size=16,
        moe_shared_expert_intermediate_size=32,
    ),
    "starcoder2": _of("starcoder2", "StarCoder 2 3B, 7B, 15B", SHARED, sliding_window=WINDOW),
    "smollm3": _of("smollm3", "SmolLM 3 3B", SHARED, no_rope_layer_interval=2),
    "exaone4": _of("exaone4", "EXAONE 4.0 1.2B, 32B", SHARED, WINDOWED),
    "exaone_moe": _of(
        "exaone_moe", "K-EXAONE 236B-A23B", SHARED, WINDOWED, FOUR_EXPERTS, DENSE_THEN_SPARSE, head_dim=8,
        num_shared_experts=1,
    ),
    "llama4_text": _LLAMA4,
    "minimax": _of(
        "minimax", "MiniMax-Text-01, M1", SHARED, LOCAL_EXPERTS, head_dim=8, block_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "minimax_m2": _of("minimax_m2", "MiniMax-M2", SHARED, LOCAL_EXPERTS, head_dim=8),
    "mamba": _of("mamba", "Mamba 130M to 2.8B", SIZES, state_size=8),
    "mamba2": _of(
        "mamba2", "Mamba 2, Codestral Mamba", SIZES, state_size=8, num_heads=4, head_dim=16, n_groups=1,
        chunk_size=16,
    ),
    "jamba": _of(
        "jamba", "Jamba 1.5, 1.7", SHARED, num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "zamba": _of(
        "zamba", "Zamba 7B", SIZES, num_hidden_layers=3, num_key_value_heads=4, attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, layers_block_type=["linear_attention", "hybrid",
        "hybrid"],
        attention_hidden_size=64, attention_head_dim=16,
    ),
    "zamba2": _of(
        "zamba2", "Zamba 2 1.2B, 2.7B, 7B", SIZES, num_hidden_layers=3, num_key_value_heads=4, mamba_d_state=8,
        n_mamba_heads=4, mamba_ngroups=1, chunk_size=16, layers_block_type=["linear_attention", "hybrid", "hybrid"],
        adapter_rank=4, use_mamba_kernels=False,
    ),
    "xlstm": _of("xlstm", "xLSTM 7B", {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 16}),
    "rwkv": _of(
        "rwkv", "RWKV-4", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
        "intermediate_size": 48},
    ),
    "lfm2": _of("lfm2", "LFM2 350M, 700M, 1.2B", SHARED, layer_types=["conv", "full_attention"]),
    "lfm2_moe": _of(
        "lfm2_moe", "LFM2 8B-A1B", SHARED, FOUR_EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1,
    ),
    "jetmoe": _of("jetmoe", "JetMoE 8B", SHARED, LOCAL_EXPERTS, kv_channels=8),
    "arcee": _of("arcee", "AFM 4.5B", SHARED),
    "afmoe": _of("afmoe", "Trinity Nano, Mini", SHARED, FOUR_EXPERTS, WINDOWED, head_dim=8, num_shared_experts=1),
    "bitnet": _of("bitnet", "BitNet b1.58 2B4T", SHARED),
    "doge": _of("doge", "Doge 20M to 320M", SHARED, num_experts=4),
    "dots1": _of("dots1", "dots.llm1", SHARED, ROUTED, first_k_dense_replace=1),
    "longcat_flash": _of(
        "longcat_flash", "LongCat Flash", LATENT, num_layers=1, ffn_hidden_size=48, expert_ffn_hidden_size=32,
        head_dim=8,
        n_routed_experts=4, zero_expert_num=2, moe_topk=2,
    ),
    "ernie4_5": _of("ernie4_5", "ERNIE 4.5 0.3B", SHARED),
    "ernie4_5_moe": _of(
        "ernie4_5_moe", "ERNIE 4.5 21B-A3B", SHARED, moe_intermediate_size=32, moe_k=2, moe_num_experts=4,
        moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1,
    ),
    "hunyuan_v1_dense": _of("hunyuan_v1_dense", "Hunyuan 0.5B to 7B", SHARED, head_dim=8),
    "hunyuan_v1_moe": _of("hunyuan_v1_moe", "Hunyuan A13B", SHARED, head_dim=8, num_experts=4, moe_topk=2),
    "seed_oss": _of("seed_oss", "Seed-OSS 36B", SHARED, head_dim=8),
    "apertus": _of("apertus", "Apertus 8B, 70B", SHARED),
    "diffllama": _of("diffllama", "DiffLlama 375M", SHARED),
    "helium": _of("helium", "Helium 1 2B", SHARED, head_dim=8),
    "dbrx": _of(
        "dbrx", "DBRX", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, **ROPE}, ffn_config={"ffn_hidden_size": 48,
        "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "persimmon": _of("persimmon", "Persimmon 8B", SIZES),
    "biogpt": _of("biogpt", "BioGPT", SIZES),
    "xglm": _of(
        "xglm", "XGLM 564M to 7.5B", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4,
        max_position_embeddings=CONTEXT,
    ),
    "cwm": _of("cwm", "Code World Model 32B", SHARED, WINDOWED, head_dim=8),
    "solar_open": _of("solar_open", "Solar Open 100B", SHARED, ROUTED, head_dim=8, n_group=1),
    "mimo_v2_flash": _of(
        "mimo_v2_flash", "MiMo-V2-Flash", SHARED, ROUTED, WINDOWED, DENSE_THEN_SPARSE, head_dim=8, v_head_dim=8,
        n_group=1,
    ),
    "minicpm3": _of("minicpm3", "MiniCPM 3 4B", LATENT, dim_model_base=16),
    "internlm3": _of("internlm3", "InternLM 3 8B", SHARED, head_dim=8),
    "youtu": _of("youtu", "Youtu-LLM 2B", LATENT),
    "jais2": _of("jais2", "Jais 2 8B, 70B", SHARED, head_dim=8),
    "hyperclovax": _of("hyperclovax", "HyperCLOVA X SEED", SHARED, head_dim=8),
    "nanochat": _of("nanochat", "nanochat d20, d32", SHARED),
    "kimi_linear": _of(
        "kimi_linear", "Kimi Linear 48B-A3B", LATENT, DENSE_THEN_SPARSE, num_experts=4, num_experts_per_token=2,
        moe_intermediate_size=32, num_shared_experts=1, layer_types=["linear_attention", "full_attention"],
        linear_head_dim=8, linear_num_heads=4,
    ),
    "aria_text": _of("aria_text", "Aria", SHARED, head_dim=8, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "modernbert-decoder": _of("modernbert-decoder", "Ettin decoders", SIZES, WINDOWED, local_attention=2 * WINDOW),
    "gemma3": _multimodal("gemma3", "Gemma 3 4B, 12B, 27B", _GEMMA3, IMAGES),
    "gemma4": _multimodal("gemma4", "Gemma 4 as published", _GEMMA4),
    "llama4": _multimodal(
        "llama4", "Llama 4 as published", _LLAMA4,
        {**IMAGES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "mistral3": _multimodal("mistral3", "Mistral Small 3.1, 3.2", _MISTRAL, {**IMAGES, "head_dim": 8}),
    "qwen3_5": _multimodal("qwen3_5", "Qwen 3.5 as published", _QWEN35, {**BLOCKS, "num_position_embeddings": 16}),
    "qwen3_5_moe": _multimodal(
        "qwen3_5_moe", "Qwen 3.5 MoE as published", _QWEN35_MOE, {**BLOCKS, "num_position_embeddings": 16}
    ),
    "llava": _multimodal("llava", "LLaVA 1.5", _of("llama", "", SHARED), {**IMAGES, "projection_dim": 32}),
    "qwen2_5_vl": _multimodal("qwen2_5_vl", "Qwen 2.5 VL", _of("qwen2_5_vl_text", "", SHARED), BLOCKS),
    "qwen3_vl": _multimodal(
        "qwen3_vl", "Qwen 3 VL", _of("qwen3_vl_text", "", SHARED, head_dim=16),
        {**BLOCKS, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
}  # fmt: skip
FAMILIES["zamba"] = replace(FAMILIES["zamba"], spread=0.15)
FAMILIES["qwen3_5"] = replace(FAMILIES["qwen3_5"], spread=0.2)
FAMILIES["diffllama"] = replace(FAMILIES["diffllama"], noise=False)
