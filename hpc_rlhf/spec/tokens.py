"""A tokenizer's tokens, read without transformers, and how two tokenizers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.spec.model_files import read_json

# What to do about a reward model with a tokenizer of its own.
HINT = "use a reward model of the actor's family: both must have the same tokenizer"


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer knows.

    Attributes:
        ids: the number of each token, added ones included.
        merges: the pairs of tokens that byte-pair encoding joins, in order; empty where there are none.
        padding: the padding token, which no model gets to see.
    """

    ids: Mapping[str, int]
    merges: Sequence[Sequence[str]] = ()
    padding: str | None = None

    def difference(self, other: Tokens) -> str | None:
        """Why a model that was trained with another tokenizer misunderstands this one's tokens; None if it does not.

        The other one may know more tokens, and the padding tokens may differ.
        """
        for token, number in self.ids.items():
            if token != self.padding and other.ids.get(token) != number:
                there = f"is number {other.ids[token]}" if token in other.ids else "does not exist"
                return f"{token!r} is number {number} in the actor's and {there} in the other"
        if self.merges and other.merges and list(self.merges) != list(other.merges):
            return "they split words differently"
        return None


def read(where: Path) -> Tokens | None:
    """The tokens of a model, from its tokenizer.json, or the vocab.json and merges.txt of older ones such as OPT; None
    without one that can be read."""
    content = read_json(where / "tokenizer.json")
    model = content.get("model")
    if isinstance(model, dict) and "vocab" in model:
        vocabulary, pairs = model["vocab"], model.get("merges") or ()
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    else:
        vocabulary, pairs = read_json(where / "vocab.json"), _lines(where / "merges.txt")
        added = read_json(where / "added_tokens.json")
    if not vocabulary:
        return None
    if isinstance(vocabulary, list):  # of a unigram model: pairs of a token and its score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
    settings = read_json(where / "tokenizer_config.json")
    padding, end = (_text(settings.get(name)) for name in ("pad_token", "eos_token"))
    return Tokens({**vocabulary, **added}, merges, None if padding == end else padding)


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _lines(path: Path) -> list[str]:
    """The merges in a file, which begins with the version of its format."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    return [line for line in text.split("\n") if line and not line.startswith("#version")]
