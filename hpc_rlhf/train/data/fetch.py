"""Downloads a hub data set into the cache, as a stage would: ``python -m hpc_rlhf.train.data.fetch NAME
SUBSET SPLIT``.

Prints one line of JSON: ``files`` with their sizes, or ``unreachable``, or ``error`` and ``hint``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.train.data.sources import load


def fetch(name: str, subset: str, split: str) -> dict[str, Any]:
    """Load a data set; gives the files of the cache that hold it."""
    source = SourceSpec(path=name, format="text", subset=subset or None, split=split)
    try:
        rows: Any = load(source)
    except HpcRlhfError as error:
        if isinstance(error.__cause__, ConnectionError):
            return {"unreachable": str(error.__cause__)}
        return {"error": f"{name}: {error.message}", "hint": error.hint}
    arrow = [Path(file["filename"]) for file in rows.cache_files]
    infos = {file.parent / "dataset_info.json" for file in arrow}
    return {"files": {str(file.resolve()): file.stat().st_size for file in (*arrow, *sorted(infos))}}


if __name__ == "__main__":
    print(json.dumps(fetch(*sys.argv[1:4])))
