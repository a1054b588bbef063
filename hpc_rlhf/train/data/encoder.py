"""Documents of plain text as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


class Encoder:
    """Documents as token ids: BOS, if there is one, the text, and EOS. Special strings in a text are text.

    Attributes:
        hash: of all that the ids depend on.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.end = [tokenizer.eos_token_id]
        self.dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
        self.slow = None if tokenizer.is_fast else tokenizer
        if self.slow is None:
            description = tokenizer.backend_tokenizer.to_str()
            self.fast = Tokenizer.from_str(description)
            self.fast.encode_special_tokens = True
            self.fast.no_padding()
            self.fast.no_truncation()
        else:
            description = json.dumps(sorted(tokenizer.get_vocab().items()))
        self.hash = hashlib.sha256(json.dumps([description, self.start, self.end]).encode()).hexdigest()

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text: (tokens,), in ``dtype``. Uses all cores."""
        ids: Iterable[list[int]]
        if self.slow is None:
            ids = (encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=False))
        else:
            ids = self.slow(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [np.array([*self.start, *each, *self.end], self.dtype) for each in ids]
