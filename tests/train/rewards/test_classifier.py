"""A reward model with another tokenizer scores dialogues as transformers alone does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.models.tokenizers import train_bpe
from hpc_rlhf.train.rewards.classifier import ClassifierReward
from hpc_rlhf.train.rewards.text import Failure, TextBatch
from tests.train import tiny

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = [
    "\n\nBe brief.\n\nHuman: What is snow?\n\nAssistant:",
    "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: And a cow?\n\nAssistant:",
    "\n\nHuman: What is snow?\n\nAssistant:",
]
MESSAGES = [
    [("system", "Be brief."), ("user", "What is snow?")],
    [("user", "Hi"), ("assistant", "Hello!"), ("user", "And a cow?")],
    [("user", "What is snow?")],
]
RESPONSES = ["Frozen water, which falls from clouds in winter.", "An animal.", "x"]
BATCH = TextBatch(PROMPTS, RESPONSES, [[]] * 3, {"prompt": PROMPTS})


def tokenizer_of(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of another family than the actor's."""
    tokenizer: PreTrainedTokenizerFast = train_bpe(iter(["snow cow water winter what hello assistant user"] * 9), 290)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def reward_of(folder: Path, budget: int = 80) -> ClassifierReward:
    return ClassifierReward(str(folder), torch.float32, torch.device("cpu"), budget)


@pytest.mark.parametrize("padding", [0, None])
@pytest.mark.parametrize("template", [CHATML, None])
def test_scores_are_those_of_transformers(tmp_path: Path, template: str | None, padding: int | None) -> None:
    tokenizer = tokenizer_of(template)
    model = tiny.classifier("llama", vocab_size=len(tokenizer), pad_token_id=padding, max_position_embeddings=128)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    alone = AutoTokenizer.from_pretrained(tmp_path)
    expected = []
    for turns, prompt, response in zip(MESSAGES, PROMPTS, RESPONSES, strict=True):
        messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", response)]]
        ids = alone(f"{prompt} {response}")["input_ids"]
        if template:
            ids = alone.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            expected.append(loaded(input_ids=torch.tensor([ids])).logits.item())

    assert reward_of(tmp_path).judge(BATCH) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3


@pytest.mark.parametrize("pads_with_eos", [False, True])
def test_reward_models_of_this_package_read_what_they_were_trained_on(tmp_path: Path, pads_with_eos: bool) -> None:
    tokenizer = tokenizer_of(None)
    model = tiny.classifier("llama", vocab_size=len(tokenizer), score_offset=0.5, max_position_embeddings=128)
    if pads_with_eos:
        model.config.pad_token_id = tokenizer.eos_token_id
    export(model, tokenizer, tmp_path, is_main=True)
    reward = reward_of(tmp_path)
    ids = reward.token_ids(PROMPTS[0], RESPONSES[0])
    assert ids == [*tokenizer(f"{PROMPTS[0]} {RESPONSES[0]}")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        expected = model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state)[0, -1].item() - 0.5
    assert reward.judge(BATCH)[0] == pytest.approx(expected, abs=1e-5)


def test_an_encoder_scores_and_refuses_what_is_too_long(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(None)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, max_position_embeddings=60, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    long, *short = reward_of(tmp_path).judge(TextBatch(PROMPTS, ["winter " * 60, "b", "c"], [[]] * 3, BATCH.columns))
    assert isinstance(long, Failure)
    assert "reads 60 tokens, and the dialogue has" in long.why
    assert all(isinstance(score, float) for score in short)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_labels": 2}, "it scores 2 labels, one is needed"), ({"num_labels": 1}, "lack the weights score.weight")],
)
def test_a_model_without_one_score_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    tokenizer = tokenizer_of(None)
    tiny.causal("llama", vocab_size=len(tokenizer), **fields).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(HpcRlhfError, match=message):
        reward_of(tmp_path)
    with pytest.raises(HpcRlhfError, match="could not be loaded"):
        reward_of(tmp_path / "missing")
