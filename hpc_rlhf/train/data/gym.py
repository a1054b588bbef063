"""Generated problems of reasoning-gym (arXiv 2505.24760), whose tasks also score the responses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from hpc_rlhf.errors import HpcRlhfError


def entries(options: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Rows with prompt, answer and metadata, which names the task as source_dataset; a pure function of the arguments.

    Args:
        options: ``SourceSpec.reasoning_gym``.

    Raises:
        HpcRlhfError: the library is missing, or does not know the task or an option.
    """
    task = options["task"]
    where = f"reasoning_gym {task}"
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise HpcRlhfError("the package reasoning-gym is missing", where, "run pip install reasoning-gym") from error
    if task not in DATASETS:
        raise HpcRlhfError(f"reasoning-gym has no task {task}", where, f"choose one of {', '.join(sorted(DATASETS))}")
    given = {name: value for name, value in options.items() if name != "task"}
    digest = hashlib.sha256(f"reasoning-gym {seed}".encode()).digest()
    try:
        dataset = create_dataset(task, **{"seed": int.from_bytes(digest[:4], "big") // 2, **given})
    except (TypeError, ValueError, AssertionError) as error:
        raise HpcRlhfError(f"reasoning-gym refuses the options: {error}", where, "correct data.sources") from error
    for place in range(given["size"]):
        entry = dataset[place]
        yield {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
