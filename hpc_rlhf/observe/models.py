"""The finished models of a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages import POLICIES


def finished_model(run: RunDir, model: str | None) -> tuple[str, Path]:
    """The name and folder of a model of a run; by default of the latest finished stage.

    Raises:
        HpcRlhfError: it is not finished, or not part of the run.
    """
    spec = read_spec(run.job_yaml)
    if model is not None and model not in spec.policies:
        maker = POLICIES[model].name
        what = f"has no {maker} stage" if model == maker else f"keeps no moving average: stages.{maker}.ema is false"
        raise HpcRlhfError(f"this run {what}", where=str(run.path))
    latest_first = [name for name, stage in reversed(spec.policies.items()) if name == stage]
    names = latest_first if model is None else [model]
    for name in names:
        files = run.stage(spec.policies[name])
        if manifest.is_done(files):
            return name, files.policy(name)
    if not names:
        makers = dict.fromkeys(kind.name for kind in POLICIES.values())
        raise HpcRlhfError(f"this run trains no chat model: it has no {' or '.join(makers)} stage", where=str(run.path))
    raise unfinished(run, "there is no finished model yet", names, RUN_FAILED)


def intact_model(run: RunDir, model: str | None) -> tuple[str, Path]:
    """``finished_model``, after all its files are compared with their SHA-256.

    Raises:
        HpcRlhfError: as there, or a file differs.
    """
    name, folder = finished_model(run, model)
    if (defect := manifest.defect(run.stage(POLICIES[name].name).model)) is not None:
        hint = f"to train it again: hpc-rlhf heal {shlex.quote(str(run.path))}"
        raise HpcRlhfError(f"the model is damaged: {defect}", where=str(folder), hint=hint, exit_code=RUN_FAILED)
    return name, folder


def unfinished(run: RunDir, what: str, missing: Sequence[str], exit_code: int) -> HpcRlhfError:
    """The error that a verb lacks models which the run has not finished."""
    return HpcRlhfError(
        f"{what}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not finished",
        where=str(run.path),
        hint=f"to see the progress: hpc-rlhf status {shlex.quote(str(run.path))}",
        exit_code=exit_code,
    )
