"""Generated problems of reasoning-gym (arXiv 2505.24760), whose tasks also score the responses.

They are generated in a process of its own: the problems of some tasks depend on how Python hashes text, which differs
from process to process unless it is set at the start.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from hpc_rlhf import safe_path
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError

COLUMN = "reasoning_gym"


def problems(options: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Rows with prompt, answer, and the whole entry as reasoning_gym; a pure function of the arguments.

    Args:
        options: ``SourceSpec.reasoning_gym``.

    Raises:
        HpcRlhfError: the library is missing, does not know the task or an option, or cannot score what it generates.
    """
    where = f"reasoning_gym {options['task']}"
    digest = hashlib.sha256(f"reasoning-gym {seed}".encode()).digest()
    arguments = {"seed": int.from_bytes(digest[:4], "big") // 2, **options}
    command, env = safe_path.module(__name__, json.dumps(arguments)), {**os.environ, "PYTHONHASHSEED": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                entry = json.loads(line)
                if "refusal" in entry:
                    raise HpcRlhfError(entry["refusal"], where, entry["hint"])
                yield {"prompt": entry["question"], "answer": entry["answer"], COLUMN: entry}
        except BaseException:
            process.kill()
            raise
        if process.wait():
            what = f"the process that generates the problems exited with {process.returncode}"
            raise HpcRlhfError(what, where, "see its output above", exit_code=RUN_FAILED)


def _entries(task: str, **options: Any) -> Iterator[dict[str, Any]]:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset, get_score_answer_fn
    except ImportError:
        yield {"refusal": "the package reasoning-gym is missing", "hint": "run pip install 'hpc-rlhf[gym]'"}
        return
    if task not in DATASETS:
        yield {"refusal": "reasoning-gym has no such task", "hint": f"choose one of {', '.join(sorted(DATASETS))}"}
        return
    try:
        dataset = create_dataset(task, **options)
    except (TypeError, ValueError, AssertionError) as error:
        yield {"refusal": f"reasoning-gym does not take these options: {error}", "hint": "correct the source"}
        return
    entries = (dataset[place] for place in range(options["size"]))
    first = next(entries)
    # Rewards get an entry as JSON, which has no tuples.
    read = json.loads(json.dumps(first))
    if dataset.score_answer(first["answer"], first) != get_score_answer_fn(task)(first["answer"], read):
        yield {"refusal": "its scorer needs what JSON cannot hold", "hint": "choose another task"}
        return
    yield from chain([first], entries)


if __name__ == "__main__":
    for one in _entries(**json.loads(sys.argv[1])):
        print(json.dumps(one))
