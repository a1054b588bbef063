"""What a run takes from the hub, and whether all of it is in the cache.

Cheap to import: every rank checks before it loads.

``hpc-rlhf prefetch`` writes a record beside the cache, of the files that a model or data set has. Only what
is in such a record counts as cached: the cache's own folders do not show whether a model is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpc_rlhf.spec.job import JobSpec

OFFLINE = "HF_HUB_OFFLINE"
Kind = Literal["model", "data set"]


@dataclass(frozen=True)
class HubItem:
    """A model or data set of the hub."""

    kind: Kind
    name: str  # its id, such as facebook/opt-1.3b
    where: str = field(compare=False)  # the first field of the spec that names it
    subset: str | None = None
    split: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.kind, self.name, self.subset, self.split)))

    def __str__(self) -> str:
        return " ".join(self.words)


def items(*specs: JobSpec) -> tuple[HubItem, ...]:
    """What specs take from the hub, each once. Local paths were made absolute when the spec was read."""
    return tuple(dict.fromkeys(item for spec in specs for item in _items(spec)))


def _items(spec: JobSpec) -> Iterator[HubItem]:
    for name, ref in spec.models:
        if isinstance(ref, str) and not os.path.isabs(ref):
            yield HubItem("model", ref, f"models.{name}")
    for stage, rewards in spec.rewards.items():
        for place, item in enumerate(rewards):
            if item.own_model is not None and not os.path.isabs(item.own_model):
                yield HubItem("model", item.own_model, f"stages.{stage}.rewards.{place}.model")
    for where, source in spec.sources.items():
        if source.path is not None and not os.path.isabs(source.path):
            yield HubItem("data set", source.path, where, source.subset or None, source.split)


def cache() -> Path:
    """HF_HOME, by the rules of huggingface_hub, which reads HF_HUB_OFFLINE for good when it is imported."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(os.environ.get("HF_HOME") or f"{base}/huggingface")


def folder(kind: Kind) -> Path:
    """The part of the cache that models or data sets are in."""
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if kind == "model" else ("HF_DATASETS_CACHE",)
    own = next((os.environ[name] for name in names if os.environ.get(name)), None)
    return _expanded(own) if own else cache() / ("hub" if kind == "model" else "datasets")


def snapshot(model: str) -> Path | None:
    """The folder in the cache with a model's files, perhaps not all of them; None if there is none."""
    stored = folder("model") / f"models--{model.replace('/', '--')}"
    try:
        return stored / "snapshots" / (stored / "refs/main").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


def _record(item: HubItem) -> Path:
    return cache() / "hpc-rlhf" / (re.sub(r"[^A-Za-z0-9._-]+", "--", "--".join(item.words)) + ".json")


def remember(item: HubItem, files: Mapping[Path, int]) -> None:
    """Record that an item is in the cache and has these files, with their sizes in bytes."""
    root = folder(item.kind).resolve()
    text = json.dumps({os.path.relpath(path, root): size for path, size in files.items()}, indent=1)
    record = _record(item)
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_name(f".{record.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(record)


def recorded(item: HubItem) -> dict[str, int]:
    """The files of an item, relative to the cache, with their sizes; empty if it was never fetched."""
    try:
        files: dict[str, int] = json.loads(_record(item).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return files


def missing(item: HubItem) -> str | None:
    """Why an item is not completely in the cache; None if it is."""
    files = recorded(item)
    if not files:
        return f"is not in {cache()}"
    root = folder(item.kind)
    for name, size in files.items():
        try:
            if (root / name).stat().st_size == size:
                continue
        except OSError:
            pass
        return f"is incomplete: {root / name} is gone from the cache"
    return None


def go_offline(spec: JobSpec) -> bool:
    """Keep this process and its children off the hub if the cache holds all that a spec needs.

    Call it before importing any library of Hugging Face. The user's own setting wins. Returns whether this
    call turned the hub off.
    """
    if OFFLINE in os.environ:
        return False
    needed = items(spec)
    if not needed or any(missing(item) for item in needed):
        return False
    os.environ[OFFLINE] = "1"
    return True
