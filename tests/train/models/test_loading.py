"""Loading models: no dropout by default, clear errors, and no half-written models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.spec.job import FromScratch
from hpc_rlhf.train.models.loading import check_fits, load_causal, load_reward, make_from_scratch
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny

IDS = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
DROPOUTS = {
    "llama": {"attention_dropout": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.1},
    "gpt2": {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "qwen2": {"attention_dropout": 0.1},
}
TINY_LLAMA = {"model_type": "llama", "vocab_size": 300, **tiny.SIZES["llama"]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_a_model_saved_with_dropout_trains_without_it(kind: str, tmp_path: Path) -> None:
    tiny.causal(kind, **DROPOUTS[kind]).save_pretrained(tmp_path)
    model = load_causal(str(tmp_path), torch.float32)
    assert all(getattr(model.config, field) == 0 for field in DROPOUTS[kind])
    evaluated = model.eval()(input_ids=IDS).logits
    assert torch.equal(model.train()(input_ids=IDS).logits, evaluated)
    critic = load_reward(str(tmp_path), torch.float32, seed=1).train()
    first, second = (critic(IDS.flatten(), (9, 9)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_dropout_is_what_the_spec_says(kind: str, tmp_path: Path) -> None:
    tiny.causal(kind).save_pretrained(tmp_path)
    model = load_causal(str(tmp_path), torch.float32, dropout=0.3)
    rates = {field: getattr(model.config, field) for field in DROPOUTS[kind] if field != "layerdrop"}
    assert set(rates.values()) == {0.3}
    model.train()
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_the_dtype_is_the_requested_one(tmp_path: Path) -> None:
    tiny.causal("llama").save_pretrained(tmp_path)
    assert load_causal(str(tmp_path), torch.bfloat16).dtype == torch.bfloat16
    assert load_reward(str(tmp_path), torch.float16, seed=1).classifier.score.weight.dtype == torch.float16


@pytest.mark.parametrize("damage", ["nothing there", "no weights", "torn weights", "torn config"])
def test_a_folder_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    if damage != "nothing there":
        tiny.causal("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    if damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "torn config":
        (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(HpcRlhfError, match="the model could not be loaded") as caught:
        load_causal(str(tmp_path), torch.float32)
    assert caught.value.where == str(tmp_path)
    assert "\n" not in caught.value.message


def test_tokens_must_fit_the_model(tokenizer: Any) -> None:
    check_fits(tiny.config("llama", vocab_size=len(tokenizer)), tokenizer, 64, "here")
    with pytest.raises(HpcRlhfError, match=f"the model has 96 tokens, but the actor's tokenizer has {len(tokenizer)}"):
        check_fits(tiny.config("llama"), tokenizer, 64, "here")
    for kind in tiny.KINDS:
        with pytest.raises(HpcRlhfError, match="takes 64 tokens, but a sequence may have 65") as caught:
            check_fits(tiny.config(kind, vocab_size=300), tokenizer, 65, "here")
        assert caught.value.where == "here"


def test_a_model_from_scratch_is_a_function_of_the_seed(tokenizer: Any, tmp_path: Path, world: World) -> None:
    ref = FromScratch(from_scratch=TINY_LLAMA)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(name) % 1000)
        make_from_scratch(ref, tokenizer, seed, tmp_path / name, world)
    a, b, c = (load_causal(str(tmp_path / name), torch.float32) for name in "abc")
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert (a.config.pad_token_id, a.config.bos_token_id, a.config.eos_token_id) == (0, 1, 2)
    assert a.config.hidden_size == 32


def test_a_model_from_scratch_is_created_once_and_again_after_an_interruption(
    tokenizer: Any, tmp_path: Path, world: World
) -> None:
    ref, folder = FromScratch(from_scratch=TINY_LLAMA), tmp_path / "initial"
    folder.mkdir()
    # What a job leaves that ends between the two files.
    tiny.config("llama").save_pretrained(folder)
    make_from_scratch(ref, tokenizer, 1, folder, world)
    assert manifest.defect(folder) is None
    assert load_causal(str(folder), torch.float32).config.vocab_size == 300
    written = (folder / "model.safetensors").stat().st_mtime_ns
    make_from_scratch(ref, tokenizer, 1, folder, world)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "lama"}, "cannot create a lama model"),
        ({"hidden_size": 30, "num_attention_heads": 7}, "cannot create a llama model"),
    ],
)
def test_an_invalid_configuration_is_one_clear_error(
    fields: dict[str, Any], says: str, tokenizer: Any, tmp_path: Path, world: World
) -> None:
    with pytest.raises(HpcRlhfError, match=says) as caught:
        make_from_scratch(FromScratch(from_scratch={**TINY_LLAMA, **fields}), tokenizer, 1, tmp_path / "m", world)
    assert caught.value.where == "from_scratch"
