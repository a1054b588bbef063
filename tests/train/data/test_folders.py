"""Folders: the files of a split and subset are those that datasets takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.train.data.folders import files_of
from hpc_rlhf.train.data.sources import unread

CONFIGS = """---
license: mit
configs:
- config_name: helpful
  data_files:
  - {split: train, path: "helpful/train-*.jsonl"}
  - {split: test, path: ["helpful/test-0.jsonl", "helpful/test-1.jsonl"]}
- config_name: harmless
  default: true
  data_files: harmless/*.jsonl
---
# A data set
"""
LAYOUTS = {
    "split files": ["train.jsonl", "test.jsonl", "README.md"],
    "shards": ["part-0.jsonl", "part-1.jsonl", "part-10.jsonl"],
    "hub": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl",
            "dataset_infos.json", "README.md"],
    "folders": ["train/a.jsonl", "train/deep/b.jsonl", "validation/c.jsonl", "notes.jsonl"],
    "one folder": ["data/train.jsonl", "dataset_infos.json"],
    "words": ["my_training_set.jsonl", "my.dev-set.jsonl", "trainer.jsonl", "contest.jsonl"],
    "hidden": [".cache/x.jsonl", "__MACOSX/y.jsonl", ".z.jsonl", "a.jsonl"],
    "names with numbers": ["train1.jsonl", "train 2.jsonl", "eval_3.jsonl"],
}  # fmt: skip


def make(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# data" if path.suffix == ".md" else json.dumps({"name": name}) + "\n")


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_splits_are_those_of_datasets(names: list[str], tmp_path: Path) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    make(tmp_path, names)
    theirs = DataFilesDict.from_patterns(
        get_data_patterns(str(tmp_path)), base_path=str(tmp_path), allowed_extensions=[".jsonl"]
    )
    for split, files in theirs.items():
        assert [str(file) for file in files_of(tmp_path, None, str(split))] == sorted(files)
    missing = next(split for split in ("validation", "test", "train", "dream") if split not in theirs)
    with pytest.raises(HpcRlhfError, match=f"no split {missing}"):
        files_of(tmp_path, None, missing)


def test_subsets_are_those_of_the_readme_or_folders(tmp_path: Path) -> None:
    make(tmp_path, [*(f"helpful/{part}-{n}.jsonl" for part in ("train", "test") for n in (0, 1)), "harmless/a.jsonl"])

    def found(subset: str | None, split: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in files_of(tmp_path, subset, split)]

    assert found("helpful", "train") == ["helpful/train-0.jsonl", "helpful/train-1.jsonl"], "a folder"
    (tmp_path / "README.md").write_text(CONFIGS)
    assert found("helpful", "test") == ["helpful/test-0.jsonl", "helpful/test-1.jsonl"]
    assert found(None, "train") == ["harmless/a.jsonl"]
    (tmp_path / "README.md").write_text(CONFIGS.replace("  default: true\n", ""))
    with pytest.raises(HpcRlhfError, match="several subsets") as caught:
        files_of(tmp_path, None, "train")
    assert caught.value.hint == "set subset to one of helpful, harmless"
    with pytest.raises(HpcRlhfError, match="no subset honest"):
        files_of(tmp_path, "honest", "train")


@pytest.mark.parametrize(
    ("names", "words"),
    [([], "no data files"), (["README.md"], "no data files"), (["a.jsonl", "b.parquet"], "a.jsonl and b.parquet")],
)
def test_a_folder_that_cannot_be_read_is_one_error(names: list[str], words: str, tmp_path: Path) -> None:
    make(tmp_path, names)
    with pytest.raises(HpcRlhfError, match=words) as caught:
        files_of(tmp_path, None, "train")
    assert (caught.value.where, caught.value.exit_code) == (str(tmp_path), 2)


def test_files_without_a_split_are_named_where_others_have_one(tmp_path: Path) -> None:
    make(tmp_path, ["train.jsonl", "test.jsonl", "raw.jsonl"])
    (sentence,) = unread(SourceSpec(path=str(tmp_path), format="text"))
    assert sentence.startswith(f"not read: raw.jsonl in {tmp_path}")
    (tmp_path / "raw.jsonl").unlink()
    assert unread(SourceSpec(path=str(tmp_path), format="text")) == []
