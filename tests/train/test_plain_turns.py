"""An artifact has the chat template and the context length that others need to use its model as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from hpc_rlhf.train.chat import ChatModel
from hpc_rlhf.train.data.dialogues import configure_tokenizer, encode, token_ids
from hpc_rlhf.train.data.rows import Sample, transcript
from hpc_rlhf.train.data.templates import prompt_text
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.plain_turns import PLAIN
from tests.train import chatty, tiny

TURNS = (("system", "Be brief."), ("human", " Hi "), ("assistant", "Hello."), ("human", "What colour is snow?"))
ROLES = {"human": "user", "assistant": "assistant", "system": "system"}
MESSAGES = [{"role": ROLES[role], "content": text} for role, text in TURNS]
KINDS = ("plain", "starts with BOS", *chatty.TEMPLATES)


def base_tokenizer(kind: str) -> Any:
    """A tokenizer as a base model comes with it."""
    if kind in chatty.TEMPLATES:
        return chatty.tokenizer(kind)
    made = tiny.tokenizer()
    if kind == "starts with BOS":  # as Llama's
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
        )
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_others_write_the_prompts_that_a_model_was_trained_on(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained = configure_tokenizer(base_tokenizer(kind), "auto")
    export(tiny.causal("llama", vocab_size=310), trained, tmp_path, is_main=True)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    (expected,) = token_ids(trained, [prompt_text(trained, TURNS[kind == "brackets" :])])
    messages = MESSAGES[kind == "brackets" :]  # that template knows no system
    assert saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    text = saved.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert saved(text, add_special_tokens=False)["input_ids"] == expected, "as evaluation harnesses do it"
    if kind not in chatty.TEMPLATES:
        begun = [*messages, {"role": "assistant", "content": "White, as"}]
        text = saved.apply_chat_template(begun, continue_final_message=True, tokenize=False)
        assert text.endswith("White, as"), "a response that was begun can be continued"
    assert saved.eos_token == trained.eos_token
    assert (kind in chatty.TEMPLATES) == (PLAIN not in saved.chat_template)
    assert trained.chat_template is None or kind in chatty.TEMPLATES, "training goes on as before"


@pytest.mark.parametrize("kind", ["plain", "starts with BOS"])
@pytest.mark.parametrize("ends", [False, True])
def test_training_goes_on_from_an_artifact_as_from_its_base(kind: str, ends: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = configure_tokenizer(base_tokenizer(kind), "auto")
    export(tiny.causal("llama", vocab_size=310), base, tmp_path, is_main=True)
    again = configure_tokenizer(AutoTokenizer.from_pretrained(tmp_path), "auto")
    samples = [Sample(TURNS, transcript(TURNS), " White. </s>"), Sample((), "", "Snow is white.")]
    assert encode(samples, again, "chosen", ends=ends) == encode(samples, base, "chosen", ends=ends)
    assert again.chat_template is None


@pytest.mark.parametrize(
    ("kind", "fields", "of_tokenizer", "expected"),
    [
        ("llama", {"max_position_embeddings": 48}, None, 48),
        ("gpt2", {"n_positions": 96}, None, 96),
        ("opt", {"max_position_embeddings": 80}, 2048, 80),
        ("llama", {"max_position_embeddings": 64}, 32, 32),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, 77, 77),
    ],
)
def test_the_longest_context_is_saved(
    kind: str, fields: dict[str, int], of_tokenizer: int | None, expected: int, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny.tokenizer()
    before = tokenizer.model_max_length = of_tokenizer or tokenizer.model_max_length
    export(tiny.causal(kind, **fields), tokenizer, tmp_path, is_main=True)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == expected
    assert tokenizer.model_max_length == before


@pytest.mark.parametrize("kind", ["plain", "chatml"])
def test_the_chat_pipeline_of_transformers_responds_as_chat_does(kind: str, tmp_path: Path) -> None:
    from transformers import pipeline

    trained = configure_tokenizer(base_tokenizer(kind), "auto")
    export(tiny.causal("llama", vocab_size=310, max_position_embeddings=128), trained, tmp_path, is_main=True)
    respond = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (result,) = respond(MESSAGES, max_new_tokens=12, do_sample=False)
    said = result["generated_text"][-1]
    assert said["role"] == "assistant"
    expected = "".join(ChatModel(tmp_path).stream(list(TURNS), 12, 0.0, seed=0))
    assert said["content"].rstrip("\N{REPLACEMENT CHARACTER}").strip() == expected
