"""Documents packed to sequences of full length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpc_rlhf.train.data.sampler import shuffled
from hpc_rlhf.train.data.token_files import TokenStream


def predicted(documents: Sequence[int]) -> np.ndarray:
    """The places of the tokens that are learned, all but the first of each document: (tokens,), int64.

    Args:
        documents: the tokens of each document, one after the other.
    """
    return np.delete(np.arange(sum(documents)), np.cumsum([0, *documents[:-1]]))


class Sequences:
    """The sequences of several streams of tokens, numbered through.

    A sequence begins with the last token of the one before it, so that every token of a document but its first is
    learned once. The last one of a stream may be shorter.

    Args:
        length: tokens of a sequence.
        cross: the documents of a sequence count as one.
    """

    def __init__(self, streams: Sequence[TokenStream], length: int, cross: bool) -> None:
        self.streams, self.size, self.cross = streams, length, cross
        self.counts = [-(-max(0, len(stream) - 1) // (length - 1)) for stream in streams]
        self.starts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, index: int) -> tuple[int, int, int]:
        """The stream of a sequence, and its first token and the one after its last there."""
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        first = (index - int(self.starts[source])) * (self.size - 1)
        return source, first, min(first + self.size, len(self.streams[source]))

    def length(self, index: int) -> int:
        """Tokens of a sequence."""
        _, first, last = self._place(index)
        return last - first

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``ids``, (tokens,), int64; ``documents``, the tokens of each document in it; and ``source``, its stream."""
        source, first, last = self._place(index)
        ids, documents = self.streams[source].read(first, last)
        return {"ids": ids, "documents": [len(ids)] if self.cross else documents, "source": source}

    def evaluated(self, seed: int, most: int) -> list[int]:
        """At most ``most`` sequences of each stream, drawn at random."""
        drawn = (
            (start, sorted(shuffled(place, count, seed, "held out") for place in range(min(count, most))))
            for start, count in zip(self.starts.tolist(), self.counts, strict=False)
        )
        return [start + index for start, indices in drawn for index in indices]
