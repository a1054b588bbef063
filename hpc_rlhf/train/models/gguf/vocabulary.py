"""What a GGUF file says of a tokenizer: a byte-level BPE vocabulary, and how texts are split before merging."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, TokenType

from hpc_rlhf.train.models.gguf.refusal import refused

# The patterns by which texts are split, with llama.cpp's names for them.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_PATTERN.replace("DIGITS", r"\p{N}"): "qwen2", _PATTERN.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe"}
# With it, llama.cpp takes a word that is a token as it is, without merges.
_WHOLE_WORDS = "llama-bpe"
_NEUTRAL = {"dropout": 0.0, "byte_fallback": False, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
_MOST_ENDS = 3  # tokens that end a response: llama.cpp's EOS, EOT and EOM


def describe(writer: GGUFWriter, tokenizer: Any, size: int, ends: list[int]) -> None:
    """Add a tokenizer and its chat template to a file.

    Args:
        size: tokens that the model has, which may be more than the tokenizer's.
        ends: tokens that end a response.

    Raises:
        HpcRlhfError: llama.cpp would split texts in another way.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    kind = _pre_tokenizer(spec)
    tokens, types = _tokens(spec, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(_merges(spec))
    bos, eos = _added_around(tokenizer)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if len(ends) > _MOST_ENDS:
        raise refused(f"more than {_MOST_ENDS} tokens end its responses")
    for add, token in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False
    ):
        add(token)
    if not isinstance(tokenizer.chat_template, str):
        raise refused("it has no chat template, or several")
    writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way in which a tokenizer splits texts."""
    model, normalizer = spec["model"], spec.get("normalizer")
    if model["type"] != "BPE":
        raise refused(f"its tokenizer is not byte-level BPE but {model['type']}")
    if any(model.get(name) not in (None, neutral) for name, neutral in _NEUTRAL.items()):
        raise refused("its tokenizer has BPE options that llama.cpp lacks")
    kind = _splits(spec.get("pre_tokenizer") or {})
    if kind is None or (spec.get("decoder") or {}).get("type") != "ByteLevel":
        raise refused("its tokenizer splits texts in a way that is not known here")
    if normalizer is not None and (kind, normalizer["type"]) != ("qwen2", "NFC"):
        raise refused(f"its tokenizer normalizes texts ({normalizer['type']})")
    if bool(model.get("ignore_merges")) != (kind == _WHOLE_WORDS):
        raise refused("its tokenizer applies merges in a way that llama.cpp does not for this kind")
    return kind


def _splits(pre: Mapping[str, Any]) -> str | None:
    """The kind of a pre-tokenizer; None if it is unknown."""
    *first, last = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(first) > 1:
        return None
    if not first:
        return "gpt-2" if last["use_regex"] else None
    (split,) = first
    if split == {"type": "Digits", "individual_digits": True}:
        return "smollm" if last["use_regex"] else None
    plain = split.get("type") == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return _PATTERNS.get(split["pattern"].get("Regex", "")) if plain and not last["use_regex"] else None


def _tokens(spec: Mapping[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """The text of each token, and its type."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary, added = spec["model"]["vocab"], spec.get("added_tokens") or []
    if not set(ByteLevel.alphabet()) <= set(vocabulary):
        raise refused("its tokenizer does not know every byte")
    known = {number: (text, TokenType.NORMAL) for text, number in vocabulary.items()}
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise refused(f"its token {token['content']!r} takes spaces around it")
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        known[token["id"]] = (token["content"], kind)
    if max(known) >= size:
        raise refused(f"its tokenizer has {max(known) + 1} tokens, but the model {size}")
    filled = [known.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _merges(spec: Mapping[str, Any]) -> list[str]:
    pairs = [each.split(" ") if isinstance(each, str) else each for each in spec["model"]["merges"]]
    if any(len(pair) != 2 or " " in "".join(pair) for pair in pairs):
        raise refused("its tokenizer has merges with spaces")
    return [" ".join(pair) for pair in pairs]


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [*[tokenizer.bos_token_id] * bos, *plain, *[tokenizer.eos_token_id] * eos]:
                return bos, eos
    raise refused("its tokenizer adds other tokens to a text than BOS and EOS")
