"""Responses are streamed: whole characters, nothing of the next turn, and complete in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rlhf.train.chat import ChatModel
from hpc_rlhf.train.data.dialogues import configure_tokenizer
from hpc_rlhf.train.data.rows import transcript
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.text_stream import NEXT_TURN, TextStream
from tests.train import chatty, tiny

HI = [("human", "What colour is grass?")]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    folder = tmp_path_factory.mktemp("model")
    # Its positions are learned, so that it cannot go beyond them.
    model = tiny.causal("gpt2", vocab_size=300, n_positions=96)
    export(model, tiny.tokenizer(), folder, is_main=True)
    return ChatModel(Path(folder))


def model_of(chat: ChatModel) -> Any:
    return chat.batch.decode_step.model


def pieces_of(chat: ChatModel, text: str, cut: int = 0) -> list[str]:
    """What is streamed if the model generates a text, without its last tokens."""
    tokens = chat.tokenizer(text)["input_ids"]
    return list(chat._text(iter(tokens[: len(tokens) - cut])))


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" Grass is green.", "Grass is green."),
        (" Grün — 七 \U0001f600!", "Grün — 七 \U0001f600!"),
        (" One\n\nTwo \n Three\n\n", "One\n\nTwo \n Three"),
        (f" Green.{NEXT_TURN} And snow?\n\nAssistant: White.", "Green."),
        (f" Green. \n{NEXT_TURN}", "Green."),
        (NEXT_TURN, ""),
        ("  \n ", ""),
        (" Human: is what I am", "Human: is what I am"),
        (" Dear\n\nHumans: hello", "Dear\n\nHumans: hello"),
        (" Green.\n\nHuma", "Green."),
        (" Green.</s>", "Green."),
    ],
)
def test_the_pieces_are_the_response_without_the_next_turn(chat: ChatModel, said: str, answer: str) -> None:
    pieces = pieces_of(chat, said)
    assert "".join(pieces) == answer
    assert all(pieces), "no empty piece"
    assert len(pieces) > 1 or len(answer) < 2, "it streams"


@pytest.mark.parametrize(
    ("said", "stops", "answer", "ended"),
    [
        (" One, two. END of it", ("END",), "One, two.", True),
        (" One, two. EN", ("END",), "One, two. EN", False),
        (" One, two.", ("two", "One,"), "", True),
        (" One, two. END", ("two. END of", ", two. E"), "One", True),
        (" Grün\nRot", ("\n",), "Grün", True),
        (f" Green.{NEXT_TURN[:5]}", ("\n\nX",), "Green.", False),
        (f" Green.{NEXT_TURN} And", ("And",), "Green.", True),
    ],
)
def test_texts_that_end_a_response_are_no_part_of_it(
    chat: ChatModel, said: str, stops: tuple[str, ...], answer: str, ended: bool
) -> None:
    stream = TextStream(chat.tokenizer, stops)
    text = ""
    for token in chat.tokenizer(said)["input_ids"]:
        text += stream.push(token)
        assert answer.startswith(text)
        if stream.ended:
            break
    assert (text + stream.finish(), stream.ended) == (answer, ended)


def test_no_token_is_sampled_once_the_next_turn_begins(chat: ChatModel) -> None:
    tokens = iter(chat.tokenizer(f" Green.{NEXT_TURN} And snow?")["input_ids"])
    assert "".join(chat._text(tokens)) == "Green."
    assert chat.tokenizer.decode(list(tokens)) == " And snow?"


def test_no_partial_character_or_part_of_the_next_turn_is_ever_shown(chat: ChatModel) -> None:
    said = " Grün 七 \U0001f600\U0001f600 ok.\n\nHuman: more"
    answer = "Grün 七 \U0001f600\U0001f600 ok."
    for cut in range(len(chat.tokenizer(said)["input_ids"])):
        for shown in ("".join(pieces_of(chat, said, cut)[:count]) for count in range(40)):
            assert answer.startswith(shown), f"{shown!r} without the last {cut} tokens"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_complete_response_of_the_model(chat: ChatModel, temperature: float) -> None:
    pieces = list(chat.stream(HI, 40, temperature, seed=1))
    answer = "".join(pieces)
    assert len(pieces) > 3
    assert list(chat.stream(HI, 40, temperature, seed=1)) == pieces
    other = "".join(chat.stream(HI, 40, temperature, seed=2))
    assert (other == answer) == (temperature == 0)
    if temperature == 0:
        ids = torch.tensor([chat.tokenizer(transcript(HI))["input_ids"]])
        tokens = model_of(chat).generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        whole = chat.tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer == whole.partition(NEXT_TURN)[0].rstrip("\N{REPLACEMENT CHARACTER}").strip()


def test_a_response_has_at_most_max_tokens(chat: ChatModel) -> None:
    drawn: list[int] = []

    def count(tokens: Any) -> Any:
        drawn.extend(tokens)
        return iter(())

    chat_text, chat._text = chat._text, count  # type: ignore[method-assign]
    try:
        list(chat.stream(HI, 7, 0.0, seed=1))
    finally:
        chat._text = chat_text  # type: ignore[method-assign]
    assert 0 < len(drawn) <= 7


def test_a_long_conversation_loses_its_oldest_tokens_and_continues(chat: ChatModel) -> None:
    turns = [("human", "word " * 60), ("assistant", "Yes."), ("human", "Why?")]
    assert len(chat.tokenizer(transcript(turns))["input_ids"]) > 96
    assert chat.forgotten(turns, 30) == len(chat.tokenizer(transcript(turns))["input_ids"]) + 30 - 96
    assert chat.forgotten(HI, 30) == 0
    assert "".join(chat.stream(turns, 30, 0.0, seed=1))
    assert "".join(chat.stream(turns, 1000, 0.0, seed=1)), "more tokens than the model has places"


def test_a_chat_template_is_used_for_the_prompt_and_the_end_of_the_turn(chat: ChatModel, tmp_path: Path) -> None:
    tokenizer = configure_tokenizer(chatty.tokenizer("chatml"), "auto")
    export(tiny.causal("gpt2", vocab_size=310, n_positions=96), tokenizer, tmp_path, is_main=True)
    model = ChatModel(tmp_path)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": HI[0][1]}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    said = model_of(model).generate(asked, do_sample=False, max_new_tokens=24, pad_token_id=0)[0, asked.shape[1] :]
    expected = tokenizer.decode(said, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}").strip()
    assert "".join(model.stream(HI, 24, 0.0, seed=1)) == expected
    assert pieces_of(model, f" Green.{NEXT_TURN} x") == pieces_of(model, f" Green.{NEXT_TURN} x<|im_end|>")
    assert "".join(pieces_of(model, f" Green.{NEXT_TURN} x")) == f"Green.{NEXT_TURN} x", "plain turns are text here"
