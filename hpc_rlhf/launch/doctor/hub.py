"""Checks whether a run's models and data are in the cache or available on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.launch.prefetch import Unreachable, explained, why_unreachable
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.hub import HubItem
from hpc_rlhf.spec.job import JobSpec

_SECONDS = 10


def check(specs: Sequence[JobSpec]) -> list[Finding]:
    """Check the models and data sets that specs take from the hub."""
    items = hub.items(*specs)
    if not items:
        return [ok("hub", "the spec uses nothing from the hub")]
    absent = {item: why for item in items if (why := hub.missing(item))}
    if not absent:
        return [ok("hub", f"all {len(items)} in {hub.cache()}: jobs with this HF_HOME will not contact the hub")]
    unreachable = why_unreachable()
    return [_absent(item, why, unreachable) for item, why in absent.items()]


def _absent(item: HubItem, why: str, unreachable: str | None) -> Finding:
    """The finding for an item that is not in the cache; ``unreachable`` is why the hub cannot be reached, if so."""
    prefetch = "run hpc-rlhf prefetch FILE on a machine with network access and the same HF_HOME"
    if os.environ.get(hub.OFFLINE, "0").upper() not in ("0", "", "NO", "OFF", "FALSE"):
        return error("hub", f"{item} {why}, and {hub.OFFLINE} is set", prefetch)
    from huggingface_hub import HfApi

    api = HfApi()
    info = api.model_info if item.kind == "model" else api.dataset_info
    try:
        with explained(item):
            if unreachable is not None:
                raise Unreachable(unreachable)
            info(item.name, timeout=_SECONDS)
    except Unreachable as problem:
        return error("hub", f"{item} {why}, and the hub cannot be reached from here ({problem})", prefetch)
    except HpcRlhfError as problem:
        return error("hub", f"{problem.where}: {problem.message}", str(problem.hint))
    return warning("hub", f"{item} {why}; the hub has it, but every rank would download it from there", prefetch)
