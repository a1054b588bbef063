"""Dialogues as tokens: rendered by the tokenizer's chat template, or as plain transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.data.rows import Sample, Turn, transcript

TEMPLATE_ROLES = {"system": "system", "human": "user", "assistant": "assistant"}


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Turns as messages for a template; successive turns of one role become one message."""
    messages: list[dict[str, str]] = []
    for role, text in turns:
        template_role = TEMPLATE_ROLES[role]
        if messages and messages[-1]["role"] == template_role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": template_role, "content": text})
    return messages


def _rendered(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> str:
    """Messages rendered by the template, without thinking where it knows thinking: responses are trained without."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )
    except Exception as error:  # a template is a program
        if messages[0]["role"] == "system" and len(messages) > 1:
            # Some templates support no system message: it becomes part of the first user message.
            system, first, *rest = messages
            first = {"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}
            return _rendered(tokenizer, [first, *rest], prompt)
        raise HpcRlhfError(
            f"the tokenizer's chat template refuses a dialogue of {', '.join(m['role'] for m in messages)} "
            f"({type(error).__name__}: {error})",
            where="data.template",
            hint="remove the dialogue, or set data.template: plain",
            exit_code=RUN_FAILED,
        ) from error
    return text


def prompt_text(tokenizer: Any, turns: Sequence[Turn], plain: str | None = None) -> str:
    """The prompt for the next response in a dialogue.

    Args:
        plain: the transcript to use if the tokenizer has no template; by default it is made from the turns.
    """
    if tokenizer.chat_template:
        return _rendered(tokenizer, _messages(turns), prompt=True)
    return transcript(turns) if plain is None else plain


def _dialogue_text(tokenizer: Any, turns: Sequence[Turn], prompt: str, answer: str) -> str:
    """A prompt and its response, including the end of the turn if the template writes one."""
    if not tokenizer.chat_template:
        return prompt + answer
    whole = _rendered(tokenizer, _messages([*turns, ("assistant", answer.strip())]), prompt=False)
    # A template may render a prompt for a response differently from a given response.
    return whole if whole.startswith(prompt) else prompt + answer.strip()


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of dialogues that may continue: with BOS if the tokenizer adds one, without EOS."""
    if not texts:
        return []
    # A template writes BOS itself. Some tokenizers append EOS to every text.
    batch = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    eos = tokenizer.eos_token_id
    return [ids[:-1] if len(ids) > 1 and ids[-1] == eos and not tokenizer.chat_template else ids for ids in batch]


def encode(samples: Sequence[Sample], tokenizer: Any, *answers: str) -> list[list[list[int]]]:
    """Samples as token ids: for each sample those of the prompt, then those of each response, which end with
    one EOS.

    Prompt and response together are the tokens of the whole dialogue, unless a token would span their
    boundary: generation starts from the prompt's tokens.

    Args:
        answers: ``chosen``, ``rejected``.
    """
    prompts = [prompt_text(tokenizer, s.turns, s.prompt) if s.prompt else "" for s in samples]
    prompt_ids = token_ids(tokenizer, prompts)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]  # plain text needs a first token
    eos = tokenizer.eos_token_id
    rows = [[ids if s.prompt else start] for ids, s in zip(prompt_ids, samples, strict=True)]
    for which in answers:
        responses = [getattr(sample, which) for sample in samples]
        wholes = [
            _dialogue_text(tokenizer, s.turns, prompt, answer) if s.prompt else answer
            for s, prompt, answer in zip(samples, prompts, responses, strict=True)
        ]
        for row, prompt, whole, ids in zip(rows, prompts, wholes, token_ids(tokenizer, wholes), strict=True):
            size = len(row[0])
            if size and ids[:size] == row[0]:
                ids = ids[size:]
            else:
                ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
            # A template may have written EOS, and more after it.
            row.append([*(ids[: ids.index(eos)] if eos in ids else ids), eos])
    return rows


def configure_tokenizer(tokenizer: Any, template: str) -> Any:
    """Set the tokenizer up for the format of dialogues: its EOS becomes the token that ends a response.

    A saved tokenizer keeps this. A base model's EOS ends a document, while turns in its template may end with another
    token (as for Qwen). EOS stays if the template has no such token.

    Args:
        template: ``DataSpec.template``: auto or plain.
    """
    if template == "plain":
        tokenizer.chat_template = None
    end = tokenizer.eos_token
    if tokenizer.chat_template:
        turns = [("human", "question")]
        prompt = prompt_text(tokenizer, turns)
        whole = _dialogue_text(tokenizer, turns, prompt, "answer")
        after = tokenizer(whole[len(prompt) :].rpartition("answer")[2], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        first = next((number for number in after if number in special), tokenizer.eos_token_id)
        end = tokenizer.convert_ids_to_tokens(first)
    tokenizer.eos_token = str(end)
    return tokenizer
