"""Asks what the data of specs is like, in a process of its own: only `train` reads data."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_rlhf import safe_path
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.row_counts import SourceCounts
from hpc_rlhf.spec.job import JobSpec


@dataclass(frozen=True)
class Survey:
    """What the data of a spec is like.

    Attributes:
        problems: for each, the field of the spec, what is wrong, and a hint that may be empty.
        data: what became of the rows that were read, by the field or the stage that they are for.
        notes: sentences on what is left out or changed, or could not be found out.
    """

    problems: Sequence[tuple[str, str, str]] = ()
    data: Mapping[str, Sequence[SourceCounts]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Survey:
        problems = [(each["path"], each["what"], each["hint"]) for each in facts["problems"]]
        data = {path: [SourceCounts.of(one) for one in counts] for path, counts in facts["data"].items()}
        return cls(problems, data, facts["notes"])


def survey(specs: Sequence[JobSpec], whole: bool = False) -> list[Survey]:
    """The survey of each spec's data.

    Args:
        whole: read all rows, those of the hub too, instead of the first of each local file.

    Raises:
        HpcRlhfError: the process that reads the data failed.
    """
    sources = [source for spec in specs for source in spec.sources.values()]
    local = any(source.reasoning_gym or source.feedback or os.path.isabs(source.path or "") for source in sources)
    if not whole and not local and not any(spec.uses_columns for spec in specs):
        return [Survey() for _ in specs]
    asked = {"specs": [spec.model_dump(mode="json") for spec in specs], "whole": whole}
    return [Survey.of(facts) for facts in _answer("hpc_rlhf.train.survey", asked)]


def preview(spec: JobSpec, stages: Sequence[str], rows: int) -> dict[str, Any]:
    """What the sources of some stages yield, as JSON; see ``train/preview.py``.

    Args:
        rows: rows of each source to show.

    Raises:
        HpcRlhfError: a source cannot be read, the tokenizer is not on this machine, or the process that reads failed.
    """
    asked = {"spec": spec.model_dump(mode="json"), "stages": stages, "rows": rows}
    answer: dict[str, Any] = _answer("hpc_rlhf.train.preview", asked)
    if error := answer.get("error"):
        raise HpcRlhfError(*error)
    return answer


def _answer(module: str, asked: Mapping[str, Any]) -> Any:
    """What a module that reads data answers, in a process of its own.

    Raises:
        HpcRlhfError: it failed.
    """
    quiet = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    env = {**dict.fromkeys(quiet, "1"), "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    # Elsewhere a folder could shadow a hub id.
    process = subprocess.run(
        safe_path.module(module), input=json.dumps(asked), stdout=subprocess.PIPE, text=True, env=env, cwd="/"
    )
    if process.returncode:
        raise HpcRlhfError(
            f"the process that reads the data exited with {process.returncode}",
            hint="see its output above",
            exit_code=RUN_FAILED,
        )
    return json.loads(process.stdout.splitlines()[-1])


def refuse_bad_data(spec: JobSpec) -> None:
    """Raise HpcRlhfError if the first rows of local data show that a stage cannot use it."""
    (known,) = survey([spec])
    for path, what, hint in known.problems[:1]:
        raise HpcRlhfError(what, where=path, hint=hint or None)
