"""Text that contains the string of a special token, such as ``</s>``, is tokenized as text.

In a rendered dialogue nothing distinguishes an end of turn that the template wrote from the same characters in a
message. So such strings in messages are marked before rendering: ``CUT`` follows their first character. What is
tokenized between two tokens of the template then distinguishes a message's ``</s>`` from the template's.
"""

from __future__ import annotations

import re
from typing import Any

from hpc_rlhf.errors import HpcRlhfError

CUT = "\ufdd0"  # a noncharacter of Unicode, so no text contains it
PROBES = ("Use it", " x y", "\nz", "<a", "1")
# Prefixes for text from the middle of a document; their tokens are removed.
GUARDS = ("|", "\n", "a", "¤")


def pattern(tokenizer: Any, rendered: str = "") -> re.Pattern[str]:
    """Matches the strings of special tokens, and of other added tokens that a rendered dialogue contains.

    The marks around thinking stay tokens: responses contain them, and templates look for them.
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    strings = {token.content for token in added if token.special or token.content in rendered}
    strings |= set(tokenizer.all_special_tokens)
    return _any_of({text for text in strings if len(text) > 1} - {"<think>", "</think>"})


def _any_of(strings: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(strings, key=len, reverse=True)) or "(?!)")


def mark(text: str, special: re.Pattern[str]) -> str:
    """Text in which no special string is whole."""
    return special.sub(lambda match: match[0][0] + CUT + match[0][1:], text)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize text with marks, without the tokens that the tokenizer itself adds.

    Raises:
        HpcRlhfError: the tokenizer has no way to write a special string as text.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    parts = re.split(f"({_any_of(set(added)).pattern})", text)  # text, token, text, …, text
    ids: list[int] = []
    unmarked = ""
    for place, part in enumerate(parts):
        if CUT not in part:
            unmarked += part
            continue
        ids += _ids(tokenizer, unmarked)
        if place and added[parts[place - 1]].rstrip:
            part = part.lstrip()
        if place + 1 < len(parts) and added[parts[place + 1]].lstrip:
            part = part.rstrip()
        ids += _as_text(tokenizer, part, follows=place > 0)
        unmarked = ""
    return ids + _ids(tokenizer, unmarked)


def _ids(tokenizer: Any, text: str, **how: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **how)["input_ids"]) if text else []


def _as_text(tokenizer: Any, part: str, follows: bool) -> list[int]:
    """Token ids of text between two special tokens.

    Args:
        follows: a special token comes before it.
    """
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    first, *others = part.split(CUT)
    continues = follows and not _starts_texts_alike(tokenizer)
    ids = _piece(tokenizer, "".join([first, *others]), continues)
    if special & set(ids):  # its model itself joins the characters
        ids = sum([_piece(tokenizer, piece, True) for piece in others], _piece(tokenizer, first, continues))
    if special & set(ids):
        raise HpcRlhfError(
            f"the tokenizer has no other way to write a special token's string in {part.replace(CUT, '')[:80]!r}",
            where="data",
            hint="take the string out of the data",
        )
    return ids


def _piece(tokenizer: Any, text: str, continues: bool) -> list[int]:
    """Tokenize text without special tokens. Some tokenizers put a space before the first word of their input."""
    for guard in GUARDS if continues else ():
        before = _ids(tokenizer, guard)
        ids = _ids(tokenizer, guard + text, split_special_tokens=True)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return _ids(tokenizer, text, split_special_tokens=True)


def _starts_texts_alike(tokenizer: Any) -> bool:
    """Whether text has the same tokens behind a special token as on its own."""
    eos = tokenizer.eos_token
    return all(_ids(tokenizer, eos + it) == _ids(tokenizer, eos) + _ids(tokenizer, it) for it in PROBES)
