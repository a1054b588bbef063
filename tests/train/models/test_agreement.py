"""Whatever the architecture, a sequence gives the same alone and beside others, in training passes and rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.models import agreement, packed_attention, rotary
from hpc_rlhf.train.models.language_model import ONE_BY_ONE, LanguageModel, RewardModel
from hpc_rlhf.train.models.loading import load_causal
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.rollout.backend import GenerationRequest, Sampling
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny

LLAMA = tiny.SIZES["llama"]
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 24,
}  # fmt: skip
NTK = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
RECURRENT: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        **LLAMA, "layers_block_type": ["attention", "mamba"], "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
        "ssm_state_size": 8,
    },
    "minimax": {**LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bamba": {**LLAMA, **MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**LLAMA, **MAMBA2, "head_dim": 8, "mamba_d_ssm": 64},
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"]},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "recurrent_gemma": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "attention_window_size": 8,
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "phi3": {**LLAMA, "rope_parameters": LONG, "original_max_position_embeddings": 24, "sliding_window": None},
    "llama": {**LLAMA, "rope_parameters": NTK, "max_position_embeddings": 24},
    "llama4_text": {
        **LLAMA, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
    },
    "cohere": {**LLAMA, "logit_scale": 0.5},
}  # fmt: skip
ROWS = [torch.randint(3, tiny.VOCABULARY, (n,)).tolist() for n in (30, 7, 41, 12)]
GREEDY = Sampling(greedy=True)


def make(kind: str) -> Any:
    return tiny.causal(kind, spread=0.3, **{**RECURRENT, **OTHERS}[kind])


def alone(kind: str, row: list[int]) -> Tensor:
    """Logits of a sequence by transformers, with a model that has seen no other one."""
    logits: Tensor = make(kind)(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    return logits


def verified(kind: str, world: World) -> tuple[Any, LanguageModel]:
    causal = make(kind)
    packed_attention.enable(causal)
    rotary.separate(causal)
    model = LanguageModel(causal)
    agreement.verify(model, world, kind)
    return causal, model


@pytest.mark.parametrize("kind", [*RECURRENT, *OTHERS])
@torch.no_grad()
def test_a_sequence_gives_the_same_alone_and_beside_others(kind: str, world: World) -> None:
    _, model = verified(kind, world)
    batch = Ragged.of(ROWS)
    actual, _ = model(batch.ids, batch.lengths, batch.tail([len(row) - 1 for row in ROWS]))
    expected = [
        alone(kind, row)[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:]).unsqueeze(1)).squeeze(1) for row in ROWS
    ]
    torch.testing.assert_close(actual, torch.cat(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*RECURRENT, "llama4_text", "phi3"])
@torch.no_grad()
def test_greedy_responses_are_the_likeliest_of_whole_passes(kind: str, world: World) -> None:
    causal, _ = verified(kind, world)
    prompts = [row[:10] for row in ROWS]
    responses = RolloutEngine(causal, world).generate(GenerationRequest(prompts, 18, -1, GREEDY, None, 2)).responses
    for prompt, response in zip(prompts, responses, strict=True):
        for place, token in enumerate(response):
            logits = alone(kind, prompt + response[:place])[-1]
            assert logits.max() - logits[token] < 1e-3, place


def let_tokens_see_their_predecessor(model: Any) -> None:
    """In the row, whichever sequence that belongs to."""
    embeddings = model.get_input_embeddings()
    forward = embeddings.forward

    def leaking(ids: Tensor) -> Tensor:
        embedded = forward(ids)
        return embedded + 0.3 * nn.functional.pad(embedded[:, :-1], (0, 0, 1, 0))

    embeddings.forward = leaking


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_a_layer_that_reaches_into_other_sequences_is_not_given_packed_rows(
    kind: str, spread: float, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = tiny.causal(kind, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in causal.parameters():
            parameter.mul_(spread)
    packed_attention.enable(causal)
    assert packed_attention.is_enabled(causal)
    let_tokens_see_their_predecessor(causal)
    agreement.verify(LanguageModel(causal), world, kind)
    assert not packed_attention.is_enabled(causal)
    assert not getattr(causal, ONE_BY_ONE)
    assert "in padded rows" in capsys.readouterr().err


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_values_are_verified_as_well(kind: str, world: World) -> None:
    classifier = tiny.classifier(kind)
    packed_attention.enable(classifier)
    agreement.verify(RewardModel(classifier), world, kind)
    assert packed_attention.is_enabled(classifier)
    let_tokens_see_their_predecessor(classifier)
    agreement.verify(RewardModel(classifier), world, kind)
    assert not packed_attention.is_enabled(classifier)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_that_sees_later_tokens_is_refused(kind: str, world: World) -> None:
    causal = tiny.causal(kind)
    embeddings = causal.get_input_embeddings()
    forward = embeddings.forward
    embeddings.forward = lambda ids: forward(ids) + forward(ids).mean(dim=1, keepdim=True)
    with pytest.raises(HpcRlhfError, match="depends on those after it"):
        agreement.verify(LanguageModel(causal), world, kind)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_noise_in_training_is_refused_where_dropout_is_0(kind: str, world: World) -> None:
    model = LanguageModel(tiny.causal(kind)).train()
    state = torch.get_rng_state()
    agreement.verify(model, world, kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    embeddings = model.causal.get_input_embeddings()
    embeddings.register_forward_hook(lambda layer, args, out: nn.functional.dropout(out, 0.01, layer.training))
    with pytest.raises(HpcRlhfError, match="draw random numbers in training where dropout is 0"):
        agreement.verify(model, world, kind)
    agreement.verify(model, world, kind, dropout=0.1)


NOISY: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "resid_dropout": 0.3, "embed_dropout": 0.3, "attention_dropout": 0.3,
    },
    "starcoder2": {**LLAMA, "residual_dropout": 0.3, "embedding_dropout": 0.3},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "resid_pdrop": 0.3, "emb_pdrop": 0.3},
    "biogpt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "layerdrop": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISY)
@torch.no_grad()
def test_every_rate_of_a_configuration_is_set(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=tiny.VOCABULARY, pad_token_id=0, **NOISY[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, ids = load_causal(str(tmp_path), torch.float32).train(), torch.tensor([ROWS[0]])
    first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_ppo_refuses_sequences_over_which_the_rotary_embedding_switches() -> None:
    phi3, llama = make("phi3").config, tiny.config("llama")
    rotary.check_rollouts(phi3, 24, "phi3")
    rotary.check_rollouts(llama, 64, "llama")
    with pytest.raises(
        HpcRlhfError, match="rotary embedding changes at 24 tokens, but prompt and response may have 25"
    ):
        rotary.check_rollouts(phi3, 25, "phi3")
