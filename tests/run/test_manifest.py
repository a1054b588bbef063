"""A manifest detects every change to a folder since it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import files, manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "deep").mkdir(parents=True)
    (made / "weights.bin").write_bytes(bytes(range(200)))
    (made / "deep" / "notes.txt").write_text("hello")
    (made / "empty").write_bytes(b"")
    manifest.write(made, {"step": 120, "metrics": {"accuracy": 0.75, "text": "é\u2028"}})
    return made


def test_a_complete_folder_verifies_and_has_its_facts(folder: Path) -> None:
    assert manifest.defect(folder) is None
    facts = manifest.require(folder, "the model")
    assert facts["step"] == 120
    assert facts["metrics"] == {"accuracy": 0.75, "text": "é\u2028"}
    assert set(facts["files"]) == {"weights.bin", "deep/notes.txt", "empty"}
    assert facts["files"]["weights.bin"]["bytes"] == 200


@pytest.mark.parametrize("name", ["weights.bin", "deep/notes.txt"])
def test_a_missing_longer_or_shorter_file_is_named(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert manifest.defect(folder, deep=False) == f"{name} has {len(content) - 1} bytes instead of {len(content)}"
    path.write_bytes(content + b"x")
    assert "instead of" in str(manifest.defect(folder, deep=False))
    path.unlink()
    assert manifest.defect(folder, deep=False) == f"{name} is missing"


def test_only_the_deep_check_finds_a_flipped_bit(folder: Path) -> None:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[77] ^= 1
    (folder / "weights.bin").write_bytes(content)
    assert manifest.defect(folder) == "weights.bin differs from its SHA-256"
    assert manifest.defect(folder, deep=False) is None


def test_a_flipped_bit_or_a_truncation_of_the_manifest_itself_is_found(folder: Path) -> None:
    path = folder / manifest.NAME
    content = path.read_bytes()
    whole = manifest.read(folder)
    for place in range(len(content)):
        flipped = content[place] ^ 1 << place % 8
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        assert manifest.read(folder) in (None, whole), f"bit of {content[place : place + 1]!r} at {place}"
        path.write_bytes(content[:place])
        assert manifest.read(folder) is None, f"cut at {place}"


def test_a_missing_manifest_and_a_missing_folder_are_different_errors(folder: Path, tmp_path: Path) -> None:
    (folder / manifest.NAME).unlink()
    assert manifest.defect(folder) == "it has no valid manifest"
    assert manifest.defect(tmp_path / "nothing") == "it does not exist"


def test_require_names_the_defect_and_the_folder(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    with pytest.raises(
        HpcRlhfError, match=r"the model of stage sft is not complete: weights\.bin is missing"
    ) as caught:
        manifest.require(folder, "the model of stage sft")
    assert caught.value.where == str(folder)
    assert caught.value.exit_code == RUN_FAILED


def test_the_ranks_shares_add_up_to_all_files(folder: Path) -> None:
    parts = [manifest.describe(folder, (rank, 2)) for rank in range(2)]
    assert {**parts[0], **parts[1]} == manifest.describe(folder)
    assert not set(parts[0]) & set(parts[1])
    (folder / "empty").unlink()
    found = [manifest.defect(folder, share=(rank, 2)) for rank in range(2)]
    assert sorted(map(str, found)) == ["None", "empty is missing"]


def test_an_interrupted_write_leaves_the_older_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    before = manifest.read(folder)
    monkeypatch.setattr(files, "fsync_path", full)
    with pytest.raises(OSError, match="No space"):
        manifest.write(folder, {"step": 121})
    assert manifest.read(folder) == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
