"""Dialogues as tokens: as the template renders them, with one token at the end of a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data.dialogues import configure_tokenizer, encode
from hpc_rlhf.train.data.rows import Sample, transcript
from hpc_rlhf.train.data.templates import prompt_text
from tests.train import chatty, tiny

TURNS = (("human", "What colour is grass?"), ("assistant", "Green."), ("human", "And snow?"))
SAMPLE = Sample(TURNS, transcript(TURNS), " Snow is white.", " Ask somebody else.")
MESSAGES = [
    {"role": "user", "content": "What colour is grass?"},
    {"role": "assistant", "content": "Green."},
    {"role": "user", "content": "And snow?"},
    {"role": "assistant", "content": "Snow is white."},
]


def only(sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    (tokens,) = encode([sample], tokenizer, "chosen")
    assert tokens is not None
    return tokens.prompt, tokens.responses[0]


@pytest.mark.parametrize("kind", chatty.TEMPLATES)
def test_prompt_and_response_are_the_tokens_of_the_template(kind: str) -> None:
    tokenizer = configure_tokenizer(chatty.tokenizer(kind), "auto")
    prompt, chosen = only(SAMPLE, tokenizer)
    expected_prompt = tokenizer.apply_chat_template(
        MESSAGES[:3], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    whole = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    newline = tokenizer("\n")["input_ids"]
    assert prompt == expected_prompt, "a rollout and a chat have the same prompt"
    assert prompt + chosen in (whole, whole[: -len(newline)])
    assert chosen[-1] == tokenizer.convert_tokens_to_ids(chatty.ENDS[kind])
    assert chosen.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(chosen, skip_special_tokens=True).strip() == "Snow is white."
    assert ("<think>" in tokenizer.decode(prompt)) == (kind == "thoughts")


@pytest.mark.parametrize("kind", chatty.TEMPLATES)
def test_eos_ends_a_turn_even_after_saving(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = configure_tokenizer(chatty.tokenizer(kind), "auto")
    assert tokenizer.eos_token == chatty.ENDS[kind]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token == chatty.ENDS[kind]
    assert prompt_text(loaded, TURNS) == prompt_text(tokenizer, TURNS)


def test_plain_uses_no_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = configure_tokenizer(chatty.tokenizer("chatml"), "plain")
    assert tokenizer.eos_token == "<|endoftext|>"
    prompt, chosen = only(SAMPLE, tokenizer)
    assert tokenizer.decode(prompt) == SAMPLE.prompt
    assert tokenizer.decode(chosen) == " Snow is white.<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    assert prompt_text(AutoTokenizer.from_pretrained(tmp_path), TURNS) == SAMPLE.prompt


def test_both_responses_of_a_pair_follow_the_same_prompt() -> None:
    tokenizer = configure_tokenizer(chatty.tokenizer("headers"), "auto")
    (tokens,) = encode([SAMPLE], tokenizer, "chosen", "rejected")
    assert tokens is not None
    chosen, rejected = tokens.responses
    assert (tokens.prompt, chosen) == only(SAMPLE, tokenizer)
    assert tokenizer.decode(rejected) == "Ask somebody else.<|eot_id|>"


def test_successive_turns_of_a_role_become_one_message() -> None:
    tokenizer = configure_tokenizer(chatty.tokenizer("chatml"), "auto")
    turns = (("human", "Hi"), ("human", "Anybody?"))
    assert prompt_text(tokenizer, turns) == "<|im_start|>user\nHi\n\nAnybody?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_without_system_messages_gets_them_in_the_user_message() -> None:
    tokenizer = configure_tokenizer(chatty.tokenizer("brackets"), "auto")
    assert prompt_text(tokenizer, (("system", "Be kind."), ("human", "Hi"))) == "<s>[INST] Be kind.\n\nHi [/INST]"
    kept = configure_tokenizer(chatty.tokenizer("chatml"), "auto")
    assert prompt_text(kept, (("system", "Be kind."), ("human", "Hi"))).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n"
    )


def test_a_dialogue_that_the_template_rejects_is_one_clear_error() -> None:
    tokenizer = chatty.tokenizer("chatml")
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(HpcRlhfError, match=r"refuses a dialogue of user .*never") as caught:
        prompt_text(tokenizer, (("human", "Hi"),))
    assert "data.template: plain" in str(caught.value.hint)


def test_an_eos_that_a_tokenizer_appends_to_every_text_is_removed_from_prompts() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    plain_prompt, plain_chosen = only(SAMPLE, tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tiny.BOS), ("</s>", tiny.EOS)]
    )
    assert tokenizer("x")["input_ids"][-1] == tiny.EOS
    prompt, chosen = only(SAMPLE, tokenizer)
    assert prompt == [tiny.BOS, *plain_prompt]
    assert chosen == plain_chosen


def test_a_token_that_would_span_prompt_and_response_is_not_used() -> None:
    """Generation starts from the prompt's own tokens, so the response is tokenized separately."""
    tokenizer = tiny.tokenizer()
    green = Sample((("human", "x"),), "What colour is gr", "ass?", "")
    prompt, chosen = only(green, tokenizer)
    assert prompt == tokenizer(green.prompt)["input_ids"]
    assert tokenizer(green.prompt + green.chosen)["input_ids"][: len(prompt)] != prompt, "it does reach over"
    assert chosen == [*tokenizer(green.chosen)["input_ids"], tiny.EOS]


def test_earlier_responses_of_a_transcript_end_for_training_on_prompts() -> None:
    tokenizer, eos = tiny.tokenizer(), tiny.tokenizer().eos_token
    for turns in (TURNS, (("system", "Be kind."), *TURNS, ("assistant", "White."), ("human", f"{eos} or not?"))):
        sample = Sample(turns, transcript(turns), " Yes.")
        (ended,), (plain,) = encode([sample], tokenizer, "chosen", ends=True), encode([sample], tokenizer, "chosen")
        assert ended is not None
        assert plain is not None
        responses = sum(role == "assistant" for role, _ in turns)
        assert ended.prompt.count(tokenizer.eos_token_id) == responses
        assert plain.prompt.count(tokenizer.eos_token_id) == 0
        assert [it for it in ended.prompt if it != tokenizer.eos_token_id] == plain.prompt
        assert ended.responses == plain.responses
        before = tokenizer.decode(ended.prompt[: ended.prompt.index(tokenizer.eos_token_id)])
        assert before.endswith("Assistant: Green.")


@pytest.mark.parametrize("kind", chatty.TEMPLATES)
def test_a_template_ends_turns_itself(kind: str) -> None:
    tokenizer = configure_tokenizer(chatty.tokenizer(kind), "auto")
    assert encode([SAMPLE], tokenizer, "chosen", ends=True) == encode([SAMPLE], tokenizer, "chosen")
