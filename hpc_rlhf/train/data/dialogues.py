"""Dialogues as tokens: as the tokenizer's chat template writes them, or as plain transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.data.rows import Sample, Turn, transcript

ROLE_IN_TEMPLATES = {"system": "system", "human": "user", "assistant": "assistant"}


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Turns as a template takes them; what one role says in a row is one message."""
    messages: list[dict[str, str]] = []
    for role, text in turns:
        named = ROLE_IN_TEMPLATES[role]
        if messages and messages[-1]["role"] == named:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": named, "content": text})
    return messages


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same, with what the system says put before the person's first words."""
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], ask: bool) -> str:
    """Messages as the template writes them. Answers are learnt without thoughts, so one that knows them asks for none."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, enable_thinking=False
        )
    except Exception as error:  # a template is a program
        if messages[0]["role"] == "system" and len(messages) > 1:  # some know no system
            return _rendered(tokenizer, _without_system(messages), ask)
        raise HpcRlhfError(
            f"the tokenizer's chat template refuses a dialogue of {', '.join(m['role'] for m in messages)} "
            f"({type(error).__name__}: {error})",
            where="data.template",
            hint="take the dialogue out, or set data.template: plain",
            exit_code=RUN_FAILED,
        ) from error
    return text


def prompt_text(tokenizer: Any, turns: Sequence[Turn], plain: str | None = None) -> str:
    """What asks for the answer to some turns.

    Args:
        plain: the transcript to take where the tokenizer has no template; made of the turns when left out.
    """
    if tokenizer.chat_template:
        return _rendered(tokenizer, _messages(turns), ask=True)
    return transcript(turns) if plain is None else plain


def _dialogue_text(tokenizer: Any, turns: Sequence[Turn], prompt: str, answer: str) -> str:
    """A prompt and its answer, with what ends the turn where a template writes that."""
    if not tokenizer.chat_template:
        return prompt + answer
    whole = _rendered(tokenizer, _messages([*turns, ("assistant", answer.strip())]), ask=False)
    # A template may write an answer that is asked for otherwise than one that was given.
    return whole if whole.startswith(prompt) else prompt + answer.strip()


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of dialogues that may go on: with BOS where it belongs to them, without EOS."""
    if not texts:
        return []
    # A template writes BOS itself. Some tokenizers put EOS behind every text.
    many = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    eos = tokenizer.eos_token_id
    return [
        ids[:-1] if len(ids) > 1 and ids[-1] == eos and not tokenizer.chat_template else ids for ids in many
    ]


def encode(samples: Sequence[Sample], tokenizer: Any, *answers: str) -> list[list[list[int]]]:
    """Samples as token ids: of each the prompt's, then those of each answer, which end with EOS once.

    Prompt and answer together are the tokens of the whole dialogue, unless a token would reach over from the one
    into the other: a model that answers is given the prompt's tokens.

    Args:
        answers: ``chosen``, ``rejected``.
    """
    prompts = [prompt_text(tokenizer, s.turns, s.prompt) if s.prompt else "" for s in samples]
    prompt_ids = token_ids(tokenizer, prompts)
    start = (
        [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    )  # plain text: something to start from
    rows = [[ids if s.prompt else start] for ids, s in zip(prompt_ids, samples, strict=True)]
    for which in answers:
        given = [getattr(sample, which) for sample in samples]
        wholes = [
            _dialogue_text(tokenizer, s.turns, prompt, answer) if s.prompt else answer
            for s, prompt, answer in zip(samples, prompts, given, strict=True)
        ]
        for row, prompt, whole, ids in zip(rows, prompts, wholes, token_ids(tokenizer, wholes), strict=True):
            size = len(row[0])
            if size and ids[:size] == row[0]:
                ids = ids[size:]
            else:
                ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
            row.append(_ended(ids, tokenizer.eos_token_id))
    return rows


def _ended(ids: list[int], eos: int) -> list[int]:
    """An answer's tokens up to its EOS, which a template may have written, with something behind it."""
    return [*(ids[: ids.index(eos)] if eos in ids else ids), eos]


def follow(tokenizer: Any, template: str) -> Any:
    """The tokenizer, set up for the way dialogues are written: its EOS is the token that ends an answer.

    What is saved with it writes and ends dialogues in the same way.

    Args:
        template: of DataSpec: auto or plain.
    """
    if template == "plain":
        tokenizer.chat_template = None
    tokenizer.eos_token = turn_end(tokenizer)
    return tokenizer


def turn_end(tokenizer: Any) -> str:
    """The token that ends an answer in the tokenizer's chat template; EOS where it has none of its own.

    A base model's EOS ends a document, and its template's turns may end with another token (Qwen's do).
    """
    if not tokenizer.chat_template:
        return str(tokenizer.eos_token)
    asked = [("human", "question")]
    prompt = prompt_text(tokenizer, asked)
    whole = _dialogue_text(tokenizer, asked, prompt, "answer")
    behind = tokenizer(whole[len(prompt) :].rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    found = next((number for number in behind if number in special), tokenizer.eos_token_id)
    return str(tokenizer.convert_ids_to_tokens(found))
