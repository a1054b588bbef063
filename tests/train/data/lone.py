"""A process that tokenizes text, which tests kill."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hpc_rlhf.train.runtime.alone import Alone


def main() -> None:
    """Tokenize a source in segments of a few hundred tokens."""
    from transformers import PreTrainedTokenizerFast

    from hpc_rlhf.spec.source import SourceSpec
    from hpc_rlhf.spec.stages import PretrainSpec
    from hpc_rlhf.train.data import documents, text_parts, texts, token_files

    token_files.SEGMENT, text_parts.BATCH, documents.PART_BYTES = 300, 100, 2000
    path, tokenizer, folder = sys.argv[1:]
    world: Any = Alone()
    source = SourceSpec(path=path, format="text")
    spec = PretrainSpec(sources=(source,), held_out=0.2, deduplicate=True, max_line_documents=20)
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    print(json.dumps(len(texts.prepare(spec, 7, loaded, Path(folder), world))), flush=True)


if __name__ == "__main__":
    main()
