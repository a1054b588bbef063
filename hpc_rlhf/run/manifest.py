"""A manifest proves that a folder is complete: it lists every file with its size and SHA-256, and contains
the SHA-256 of its own content. It is written last.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.files import fsync_path, write_atomically
from hpc_rlhf.run.layout import StageDir

NAME = "manifest.json"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe(folder: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Flush the files below a folder; gives the size and SHA-256 of each.

    Args:
        share: (rank, size) to take only every size-th file, starting with number rank.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME)[share[0] :: share[1]]:
        fsync_path(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files


def _seal(facts: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write(folder: Path, facts: dict[str, object], files: dict[str, object] | None = None) -> None:
    """Write the manifest of every file below a folder: atomically, last, and flushed to disk.

    Args:
        facts: what else it contains.
        files: the results of ``describe``, if the ranks shared that work.
    """
    files = describe(folder) if files is None else files
    content = {**facts, "files": files}
    text = json.dumps({**content, "seal": _seal(content)}, indent=1, sort_keys=True)
    write_atomically(folder / NAME, text, durable=True)
    for path in {folder, *(p for p in folder.rglob("*") if p.is_dir())}:
        fsync_path(path)


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None if it is missing or was changed."""
    try:
        facts = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict) or facts.pop("seal", None) != _seal(facts):
        return None
    return facts


def defect(folder: Path, deep: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a folder; None if it is complete.

    Args:
        deep: also compare each file's SHA-256, not only its size.
        share: (rank, size) to check only every size-th file, starting with number rank.
    """
    facts = read(folder)
    if facts is None:
        return "it has no valid manifest" if folder.exists() else "it does not exist"
    for name, expected in sorted(facts["files"].items())[share[0] :: share[1]]:
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if deep and sha256(path) != expected["sha256"]:
            return f"{name} differs from its SHA-256"
    return None


def is_done(stage: StageDir) -> bool:
    """Whether a stage's artifact is complete, by the sizes of its files.

    Hashing a large model is left to the compute nodes, which do it before they train on it.
    """
    return defect(stage.model, deep=False) is None


def require(folder: Path, what: str, deep: bool = True) -> dict[str, Any]:
    """The manifest of a complete folder; for ``deep`` see ``defect``.

    Raises:
        HpcRlhfError: the folder is not complete; the message gives the reason.
    """
    reason = defect(folder, deep)
    if reason is not None:
        raise HpcRlhfError(
            f"{what} is not complete: {reason}",
            where=str(folder),
            hint="let the stage that produces it finish first; no stage trains on an incomplete input",
            exit_code=RUN_FAILED,
        )
    facts = read(folder)
    assert facts is not None
    return facts
