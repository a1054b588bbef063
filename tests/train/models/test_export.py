"""Exported folders contain the whole model and load in transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.data.dialogues import configure_tokenizer
from hpc_rlhf.train.models.export import export, full_weights, module_weights
from hpc_rlhf.train.models.language_model import RewardModel
from hpc_rlhf.train.models.loading import load_causal, load_reward
from hpc_rlhf.train.models.lora import adapt
from hpc_rlhf.train.ragged import Ragged
from tests.train import chatty, tiny

IDS = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_exported_language_model_loads_bit_for_bit(
    kind: str, tied: bool, dtype: torch.dtype, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.causal(kind, tie_word_embeddings=tied)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # and no buffer, as DeepSpeed does
    export(model, tokenizer, tmp_path / "model", is_main=True)
    assert list((tmp_path / "model").glob("*.safetensors"))
    assert not list((tmp_path / "model").glob("*.bin")), "no pickle"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    assert back.dtype == dtype
    assert (back.get_input_embeddings().weight is back.get_output_embeddings().weight) == tied
    for (name, weight), (other_name, other) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(weight, other), name
    torch.testing.assert_close(back(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_full_weights_are_all_parameters_once_by_name(kind: str, tied: bool) -> None:
    model = tiny.causal(kind, tie_word_embeddings=tied)
    weights = list(full_weights(module_weights(model)))
    assert [name for name, _ in weights] == [name for name, _ in model.named_parameters()]
    for (_, weight), parameter in zip(weights, model.parameters(), strict=True):
        assert torch.equal(weight, parameter)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_export_merges_adapters_and_leaves_the_model_unchanged(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.causal(kind)
    adapt(model, LoraSpec(rank=4), seed=1)
    for name, parameter in model.named_parameters():
        if ".lora_b" in name:
            parameter.normal_(0, 0.1)
    expected = model(input_ids=IDS).logits
    export(model, tokenizer, tmp_path, is_main=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not [name for name, _ in back.named_parameters() if "lora" in name or ".base." in name]
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_only_the_main_rank_writes(tokenizer: Any, tmp_path: Path) -> None:
    export(tiny.causal("gpt2"), tokenizer, tmp_path / "model", is_main=False)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_a_reward_model_gives_the_same_scores_in_transformers(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = RewardModel(tiny.classifier(kind))
    model.offset = 2.5
    rows = [[5, 6, 7, tiny.EOS], [9], [8, 30, 31, 32, 33, 34, tiny.EOS]]
    batch = Ragged.of(rows)
    values = model(batch.ids, batch.lengths)
    export(model.classifier, tokenizer, tmp_path, is_main=True)
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert back.config.num_labels == 1
    scores = torch.cat([back(input_ids=torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(values[batch.tail([1, 1, 1])], scores - 2.5, atol=1e-5, rtol=1e-5)
    assert back.config.score_offset == 2.5, "for others to subtract"

    again = load_reward(str(tmp_path), torch.float32, seed=None).eval()
    torch.testing.assert_close(again(batch.ids, batch.lengths), values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_reward_model_from_a_language_model_has_a_head_from_the_seed(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny.causal("opt")
    export(model, tokenizer, tmp_path, is_main=True)
    torch.manual_seed(1)
    first = load_reward(str(tmp_path), torch.float32, seed=5)
    torch.manual_seed(2)
    again = load_reward(str(tmp_path), torch.float32, seed=5)
    other = load_reward(str(tmp_path), torch.float32, seed=6)
    head = first.classifier.score
    assert head.bias is None
    assert torch.equal(head.weight, again.classifier.score.weight)
    assert not torch.equal(head.weight, other.classifier.score.weight)
    body = load_causal(str(tmp_path), torch.float32).base_model.state_dict()
    for name, weight in first.classifier.base_model.state_dict().items():
        assert torch.equal(weight, body[name]), name


def test_a_saved_model_also_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model, chatml = (tiny.causal("qwen2", vocab_size=310), configure_tokenizer(chatty.tokenizer("chatml"), "auto"))
    document_end = model.generation_config.eos_token_id = chatml.convert_tokens_to_ids("<|endoftext|>")
    export(model, chatml, tmp_path / "once", is_main=True)
    export(model, chatml, tmp_path / "twice", is_main=True)
    for name in ("once", "twice"):
        saved = GenerationConfig.from_pretrained(tmp_path / name)
        assert saved.eos_token_id == [chatml.convert_tokens_to_ids("<|im_end|>"), document_end]


@pytest.mark.parametrize("full_at", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_full_disk_is_a_clear_error_and_what_was_written_goes(
    full_at: str, tokenizer: Any, small_disk: Path, tmp_path: Path
) -> None:
    model = tiny.causal("llama", hidden_size=128, vocab_size=5000)
    export(model, tokenizer, tmp_path / "whole", is_main=True)
    order = sorted((tmp_path / "whole").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    before = [path for path in order if path.name != full_at][: [path.name for path in order].index(full_at)]
    page = 4096
    room = sum(-(-path.stat().st_size // page) * page for path in before) + (page if "model" in full_at else 0)
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    with pytest.raises(HpcRlhfError, match=r"the model could not be written: .*No space left on device") as caught:
        export(model, tokenizer, small_disk / "model", is_main=True)
    assert "GB and run the stage again" in str(caught.value)
    assert caught.value.exit_code == RUN_FAILED
    assert not (small_disk / "model").exists()
    assert shutil.disk_usage(small_disk).free == room
