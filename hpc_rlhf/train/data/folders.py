"""Which files of a local folder belong to a split, as ``datasets.load_dataset(FOLDER, subset, split=…)`` finds them.

A folder may be a plain one, one of shards in subfolders, or a clone of a data set on the hub. The patterns are those of
datasets' ``data_files.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data.files import kind_of

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ABOUT_DATA = frozenset({
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "metadata.json", "state.json",
})  # fmt: skip
_SHARD = re.compile(r"data/(?P<split>[^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_SEPARATOR = r"[-._ 0-9]"


def files_of(folder: Path, subset: str | None, split: str) -> list[Path]:
    """The data files of a split, sorted by their paths.

    Args:
        subset: a configuration that README.md names, or a subfolder; None for the default.

    Raises:
        HpcRlhfError: there are none, or files of different kinds.
    """
    configs = _configs(folder)
    names = [config["config_name"] for config in configs]
    if subset is not None and subset not in names:
        if not (folder / subset).is_dir():
            hint = f"choose one of {', '.join(names)}" if names else f"name a folder in {folder}"
            raise HpcRlhfError(f"the folder has no subset {subset}", where=str(folder), hint=hint)
        folder, configs = folder / subset, []
    splits = _by_config(folder, configs, subset) if configs else _by_name(folder, _data_files(folder))
    if not splits:
        hint = "data files end with .json, .jsonl, .csv, .parquet, .arrow or .txt, compressed or not"
        raise HpcRlhfError("the folder has no data files", where=str(folder), hint=hint)
    if split not in splits:
        hint = f"choose one of {', '.join(splits)}, or give the path of a file"
        raise HpcRlhfError(f"the folder has no split {split}", where=str(folder), hint=hint)
    files = splits[split]
    other = next((file for file in files if kind_of(file) != kind_of(files[0])), None)
    if other is not None:
        raise HpcRlhfError(
            f"the folder has files of two kinds, {files[0].relative_to(folder)} and {other.relative_to(folder)}",
            where=str(folder),
            hint="they may be the same rows twice: make a source of each kind, or remove one",
        )
    return files


def unread_files(folder: Path) -> list[Path]:
    """Data files of a folder that belong to no split, because only the names of others show one."""
    if _configs(folder):
        return []
    files = _data_files(folder)
    read = {file for split in _by_name(folder, files).values() for file in split}
    return [file for file in files if file not in read]


def _data_files(folder: Path) -> list[Path]:
    """All data files at any depth, without hidden ones and those that describe the data; text files if there are no
    others."""
    files = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in relative.parts[:-1]) or path.name.startswith(".")
        if not hidden and path.name not in _ABOUT_DATA and kind_of(path) is not None and path.is_file():
            files.append(path)
    rows = [path for path in files if kind_of(path) != "text"]
    return sorted(rows or files, key=str)


def _by_name(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names show: data/SPLIT-00000-of-00001, or a word in the names of folders, or in
    those of files; all are train if none does."""
    names = {file: file.relative_to(folder) for file in files}
    shards = {file: _SHARD.fullmatch(name.as_posix()) for file, name in names.items()}
    splits: dict[str, list[Path]] = {}
    for file, shard in shards.items():
        if shard is not None:
            splits.setdefault(shard["split"], []).append(file)
    for parts in (slice(-1), slice(-1, None)):
        if splits:
            return splits
        for split, words in _KEYWORDS.items():
            word = re.compile(rf"(?:.*{_SEPARATOR})?(?:{'|'.join(words)})(?:{_SEPARATOR}.*)?")
            own = [file for file, name in names.items() if any(word.fullmatch(part) for part in name.parts[parts])]
            splits |= {split: own} if own else {}
    return splits or ({"train": list(files)} if files else {})


def _configs(folder: Path) -> list[dict[str, Any]]:
    """The configurations in the YAML at the head of README.md that name their files."""
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        facts = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return []
    configs = facts.get("configs") if isinstance(facts, dict) else None
    named = [one for one in configs or () if isinstance(one, dict) and one.get("data_files")]
    return [{"config_name": "default", **one} for one in named]


def _by_config(folder: Path, configs: Sequence[dict[str, Any]], subset: str | None) -> dict[str, list[Path]]:
    """Files by the split that README.md names for a subset."""
    names = [str(config["config_name"]) for config in configs]
    if subset is None:
        defaults = [one for one in configs if one.get("default")] or [
            one for one in configs if len(configs) == 1 or one["config_name"] == "default"
        ]
        if not defaults:
            hint = f"set subset to one of {', '.join(names)}"
            raise HpcRlhfError("the folder has several subsets", where=str(folder), hint=hint)
        config = defaults[0]
    else:
        config = configs[names.index(subset)]
    entries = config["data_files"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        entries = [{"split": "train", "path": entries}]
    splits: dict[str, list[Path]] = {}
    for entry in entries:
        paths = entry.get("path") or []
        for pattern in [paths] if isinstance(paths, str) else paths:
            files = [path for path in folder.glob(str(pattern).lstrip("/")) if path.is_file() and kind_of(path)]
            splits.setdefault(str(entry.get("split")), []).extend(sorted(files, key=str))
    return {split: files for split, files in splits.items() if files}
