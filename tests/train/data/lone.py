"""A world of one rank without torch, and a process that tokenizes text in it, which tests kill."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Lone:
    """Stands for the ranks of a run."""

    rank, size = 0, 1

    @staticmethod
    def on_main(make: Callable[[], T]) -> T:
        return make()

    @staticmethod
    def on_each(make: Callable[[], T]) -> list[T]:
        return [make()]


def main() -> None:
    """Tokenize a source in segments of a few hundred tokens."""
    from transformers import PreTrainedTokenizerFast

    from hpc_rlhf.spec.source import SourceSpec
    from hpc_rlhf.spec.stages import PretrainSpec
    from hpc_rlhf.train.data import documents, texts, token_files

    token_files.SEGMENT, texts.BATCH, documents.PART_BYTES = 300, 100, 2000
    path, tokenizer, folder = sys.argv[1:]
    world: Any = Lone()
    spec = PretrainSpec(sources=(SourceSpec(path=path, format="text"),), held_out=0.2, deduplicate=True)
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    print(json.dumps(len(texts.prepare(spec, 7, loaded, Path(folder), world))), flush=True)


if __name__ == "__main__":
    main()
