"""How many samples a stage is going to have, where that can be told without reading the data."""

from __future__ import annotations

from pathlib import Path

from hpc_rlhf.spec.data import SourceSpec
from hpc_rlhf.spec.model import JobSpec

# Larger files are not read through to count their lines.
_COUNTED = 2**29


def expected_samples(spec: JobSpec, stage: str) -> int | None:
    """Samples that a stage trains on, about: prompts are drawn to stages by their hashes, and unusable rows are left out.

    None where a source is on the hub, or in files whose rows are not counted fast.
    """
    rows = 0.0
    for source in spec.data.sources:
        try:
            count = _rows(source)
        except OSError:
            return None
        if count is None:
            return None
        rows += count * source.weight
    shares = {name: getattr(spec.data.split, name) for name in spec.trained}
    total = sum(shares.values())
    return round(rows * shares[stage] / total * (1 - spec.data.held_out)) if total else None


def _rows(source: SourceSpec) -> int | None:
    if source.demo is not None:
        return source.demo
    path = Path(source.path or "")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    lined = [file for file in files if file.suffix == ".jsonl" and file.is_file()]
    if not lined or len(lined) < len(files) or sum(file.stat().st_size for file in lined) > _COUNTED:
        return None
    return sum(_lines(file) for file in lined)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
