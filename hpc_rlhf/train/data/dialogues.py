"""Dialogues as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_rlhf.train.data import special_strings
from hpc_rlhf.train.data.rows import Sample, Turn
from hpc_rlhf.train.data.templates import THINKING_DEFAULT, Rendered, Renderer, knows_thinking
from hpc_rlhf.train.plain_turns import drop_plain


@dataclass(frozen=True)
class Tokens:
    """A sample as token ids.

    Attributes:
        prompt: token ids of the prompt. A text without a prompt has BOS here, if there is one.
        responses: token ids of each response, ending with one EOS; empty for an empty response.
        settings: the template's, for this prompt.
        drops_thinking: the template leaves the thinking of a response out.
    """

    prompt: list[int]
    responses: list[list[int]]
    settings: Mapping[str, Any]
    drops_thinking: bool = False


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of dialogues that may continue: with BOS if the tokenizer adds one, without EOS.

    Args:
        texts: with marks (see ``special_strings``).

    Raises:
        HpcRlhfError: the tokenizer has no way to write a special string as text.
    """
    marked = [special_strings.CUT in text for text in texts]
    unmarked = [text for text, is_marked in zip(texts, marked, strict=True) if not is_marked]
    # A template writes BOS itself. Some tokenizers append EOS to every text.
    adds, eos = not tokenizer.chat_template, tokenizer.eos_token_id
    batch = iter(tokenizer(unmarked, add_special_tokens=adds)["input_ids"] if unmarked else ())
    start = tokenizer("")["input_ids"][:1] if adds else []
    start = start if start == [tokenizer.bos_token_id] else []

    def ids_of(text: str, is_marked: bool) -> list[int]:
        if is_marked:
            return start + special_strings.token_ids(tokenizer, text)
        ids: list[int] = next(batch)
        return ids[:-1] if adds and len(ids) > 1 and ids[-1] == eos else ids

    return [ids_of(text, is_marked) for text, is_marked in zip(texts, marked, strict=True)]


def encode(samples: Sequence[Sample], tokenizer: Any, *answers: str, ends: bool = False) -> list[Tokens | None]:
    """Samples as token ids; None if the template writes a response otherwise than as a continuation of a prompt.

    Prompt and response together are the tokens of the whole dialogue, unless a token would span their
    boundary: generation starts from the prompt's tokens.

    Args:
        answers: ``chosen``, ``rejected``.
        ends: as ``Renderer`` takes it.

    Raises:
        HpcRlhfError: the template refuses a dialogue, or the tokenizer has no way to write its text.
    """
    renderer = Renderer(tokenizer, ends)
    texts = [renderer.dialogue(sample, *[getattr(sample, which) for which in answers]) for sample in samples]
    ids = iter(token_ids(tokenizer, [text for it in texts if it is not None for text in (it.prompt, *it.wholes)]))
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]  # plain text needs a first token

    def tokens(text: Rendered) -> Tokens:
        prompt = next(ids)
        prompt = prompt if text.prompt else start
        responses = [_response(tokenizer, prompt, next(ids), whole[len(text.prompt) :]) for whole in text.wholes]
        return Tokens(prompt, responses, text.settings, text.drops_thinking)

    return [None if text is None else tokens(text) for text in texts]


def _response(tokenizer: Any, prompt: list[int], whole: list[int], text: str) -> list[int]:
    """Token ids of a response.

    Args:
        prompt, whole: token ids of the prompt, and of prompt and response together.
        text: the response.
    """
    if not text:
        return []
    size, eos = len(prompt), tokenizer.eos_token_id
    ids = whole[size:] if size and whole[:size] == prompt else special_strings.token_ids(tokenizer, text)
    # A template may have written EOS, and more after it.
    return [*(ids[: ids.index(eos)] if eos in ids else ids), eos]


def shorten(sample: Sample, tokens: Tokens, tokenizer: Any, longest: int, ends: bool = False) -> list[int]:
    """The token ids of a prompt that is too long, without as many of its oldest turns as need be.

    The system message and BOS stay. If the last turn is too long by itself, its text is cut on the left.
    """
    renderer = Renderer(tokenizer, ends)
    system = [turn for turn in sample.turns[:1] if turn[0] == "system"]
    starts = [place for place, (role, _) in enumerate(sample.turns) if role == "human"]

    def ids_of(*turns: Turn) -> list[int]:
        return token_ids(tokenizer, [renderer.prompt([*system, *turns], None, tokens.settings, sample.where)])[0]

    for place in starts[1:]:
        shorter = ids_of(*sample.turns[place:])
        if len(shorter) <= longest:
            return shorter
    ids = tokens.prompt
    if starts:
        last = sample.turns[starts[-1] :]
        ids, empty = ids_of(*last), ids_of((last[0][0], ""), *last[1:])
        before = _common(ids, empty)
        after = _common(ids[before:][::-1], empty[before:][::-1])
        if before + after <= longest:
            return ids[:before] + ids[before + len(ids) - longest :]
    # Not even the frame of a turn fits.
    start = [token for token in ids[:1] if token == tokenizer.bos_token_id]
    return start + ids[len(ids) - longest + len(start) :]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their start."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def pieces(tokens: Tokens, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """A text in pieces of at most ``longest`` tokens: what comes before a piece, and the piece.

    Before a piece is BOS, or else the last token of the piece before it, so that all tokens are learned.
    """
    (ids,) = tokens.responses
    begin = 0
    while begin < len(ids):
        before = tokens.prompt or ids[max(0, begin - 1) : begin]
        end = begin + longest - len(before)
        yield before, ids[begin:end]
        begin = end


def configure_tokenizer(tokenizer: Any, template: str, thinks: Callable[[], bool] = bool) -> Any:
    """Set the tokenizer up for the format of dialogues: its EOS becomes the token that ends a response.

    A saved tokenizer keeps this. A base model's EOS ends a document, while turns in its template may end with another
    token (as for Qwen). EOS stays if the template has no such token. If prompts depend on whether a response thinks,
    they are by default as for most responses in the data; for a server, too, which sets nothing.

    Args:
        template: ``DataSpec.template``: auto or plain.
        thinks: whether most responses in the data think.
    """
    if template == "plain":
        tokenizer.chat_template = None
    drop_plain(tokenizer)
    end = tokenizer.eos_token
    if tokenizer.chat_template:
        if isinstance(tokenizer.chat_template, dict):  # several, by name
            tokenizer.chat_template = tokenizer.get_chat_template()
        if knows_thinking(tokenizer):
            tokenizer.chat_template = THINKING_DEFAULT.format(str(thinks()).lower()) + tokenizer.chat_template
        after = Renderer(tokenizer).end_of("answer")
        special = set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        end = tokenizer.convert_ids_to_tokens(next((it for it in ids if it in special), tokenizer.eos_token_id))
    tokenizer.eos_token = str(end)
    return tokenizer
