"""Checkpoints are there whole or not at all, and never lead back to the start in silence."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf import manifest
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.checkpoint import CheckpointStore
from hpc_rlhf.train.world import World


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "stages" / "sft" / "checkpoints"


@pytest.fixture
def store(folder: Path, world: World) -> CheckpointStore:
    made = CheckpointStore(folder, "1-0", keep=2, world=world)
    made.claim()
    return made


def writing(text: str) -> Any:
    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "weights.pt").write_text(text)

    return write


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, writing(f"weights of {step}"), {"loss": step / 2})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith((".", "owner")))


def damage(folder: Path, how: str) -> None:
    file, facts = folder / "engine" / "weights.pt", folder / manifest.NAME
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    if how == "bit":
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    if how == "file gone":
        file.unlink()
    if how == "manifest gone":
        facts.unlink()
    if how == "manifest cut":
        facts.write_bytes(facts.read_bytes()[:40])
    if how == "manifest bit":
        facts.write_text(facts.read_text().replace('"step": ', '"step": 9'))
    if how == "empty":
        file.unlink()
        facts.unlink()


DAMAGES = ["cut", "bit", "file gone", "manifest gone", "manifest cut", "manifest bit", "empty"]


def test_a_stage_starts_without_one(store: CheckpointStore, folder: Path, world: World) -> None:
    assert store.latest() is None
    assert CheckpointStore(folder / "nowhere", "1-0", 2, world).latest() is None


def test_the_latest_comes_back_with_its_state(store: CheckpointStore, folder: Path) -> None:
    save(store, 10, 20)
    found = store.latest()
    assert found is not None
    assert (found.step, found.state) == (20, {"loss": 10.0})
    assert (found.folder / "engine" / "weights.pt").read_text() == "weights of 20"
    assert names(folder) == ["step-00000010", "step-00000020"]
    facts = manifest.require(found.folder, "it")
    assert (facts["attempt"], facts["world_size"]) == ("1-0", 1)


def test_steps_are_compared_as_numbers(store: CheckpointStore) -> None:
    save(store, 9, 100_000, 99_999)
    found = store.latest()
    assert found is not None
    assert found.step == 100_000


@pytest.mark.parametrize("how", DAMAGES)
def test_a_torn_one_is_set_aside_and_the_one_before_taken(
    store: CheckpointStore, folder: Path, how: str
) -> None:
    save(store, 10, 20)
    damage(folder / "step-00000020", how)
    found = store.latest()
    assert found is not None
    assert (found.step, found.state) == (10, {"loss": 5.0})
    assert names(folder) == ["step-00000010", "torn-step-00000020"]
    save(store, 20)
    again = store.latest()
    assert again is not None
    assert again.step == 20, "the step can be saved again"


@pytest.mark.parametrize("how", DAMAGES)
def test_when_all_are_torn_no_attempt_starts_anew(
    store: CheckpointStore, folder: Path, world: World, how: str
) -> None:
    save(store, 10, 20)
    for name in names(folder):
        damage(folder / name, how)
    for attempt in ("1-0", "1-1", "2-0"):  # each requeue is another attempt
        later = CheckpointStore(folder, attempt, keep=2, world=world)
        with pytest.raises(HpcRlhfError, match="none of the 2 checkpoints is whole") as caught:
            later.latest()
        assert caught.value.where == str(folder)
        assert caught.value.exit_code == RUN_FAILED
    for name in names(folder):
        (folder / name).rename(folder / f"moved-{name}")
    assert store.latest() is None, "once they are out of the way, as the hint says"


def test_one_of_another_number_of_ranks_is_refused(store: CheckpointStore, folder: Path) -> None:
    save(store, 10)
    target = folder / "step-00000010"
    facts = manifest.require(target, "it")
    manifest.write(target, {**facts, "world_size": 4})
    with pytest.raises(HpcRlhfError, match="made by 4 ranks and this attempt has 1") as caught:
        store.latest()
    assert caught.value.where == str(target)
    assert names(folder) == ["step-00000010"], "it is whole, and kept"


def test_only_the_newest_are_kept_and_strangers_left_alone(store: CheckpointStore, folder: Path) -> None:
    (folder / "step-notes").mkdir()
    save(store, 10, 20, 30, 40)
    assert names(folder) == ["step-00000030", "step-00000040", "step-notes"]


def test_a_step_saved_before_is_not_saved_again(store: CheckpointStore) -> None:
    assert store.save(10, writing("first"), {"loss": 5.0})

    def never(folder: Path) -> None:
        pytest.fail("written again")

    assert not store.save(10, never, {"loss": 99.0})
    found = store.latest()
    assert found is not None
    assert found.state == {"loss": 5.0}


@pytest.mark.parametrize("step", [10, 20])
def test_an_attempt_that_lost_the_stage_cannot_save(
    store: CheckpointStore, folder: Path, world: World, step: int
) -> None:
    """Neither a step that is new nor one that the owner has saved: it must learn that it is to end."""
    newer = CheckpointStore(folder, "1-1", keep=2, world=world)
    newer.claim()
    save(newer, 10)
    with pytest.raises(HpcRlhfError, match="attempt 1-0 no longer owns this stage: 1-1 does"):
        save(store, step)
    assert names(folder) == ["step-00000010"]
    found = newer.latest()
    assert found is not None
    assert manifest.require(found.folder, "it")["attempt"] == "1-1"


def test_an_attempt_that_loses_the_stage_while_it_writes_does_not_commit(
    store: CheckpointStore, folder: Path, world: World
) -> None:
    save(store, 10)
    newer = CheckpointStore(folder, "1-1", keep=2, world=world)

    def write(partial: Path) -> None:
        writing("stale")(partial)
        (folder / "owner").write_text("1-1")  # a claim whose cleaning did not see this folder yet

    with pytest.raises(HpcRlhfError, match="no longer owns"):
        store.save(20, write, {})
    found = newer.latest()
    assert found is not None
    assert found.step == 10
    newer.claim()
    assert names(folder) == ["step-00000010"], "what is left of it goes with the next claim"


@pytest.mark.parametrize("when", ["writing", "committing"])
def test_a_full_disk_leaves_the_older_checkpoint_and_no_half_one(
    store: CheckpointStore, folder: Path, world: World, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 10)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "committing":
        monkeypatch.setattr(manifest, "write", full)
        with pytest.raises(HpcRlhfError, match=r"the file system refused: .*No space left on device"):
            save(store, 20)
        monkeypatch.undo()
    else:
        with pytest.raises(OSError, match="No space left"):
            store.save(20, full, {})
    later = CheckpointStore(folder, "1-1", keep=2, world=world)
    later.claim()
    assert names(folder) == ["step-00000010"]
    found = later.latest()
    assert found is not None
    assert found.step == 10


def test_a_part_of_a_step_stands_between_the_steps(store: CheckpointStore, folder: Path) -> None:
    store.save(10, writing("a"), {})
    store.save(10, writing("b"), {}, part=3)
    found = store.latest()
    assert found is not None
    assert (found.step, found.part) == (10, 3)
    store.save(11, writing("c"), {})
    found = store.latest()
    assert found is not None
    assert (found.step, found.part) == (11, 0)
    assert names(folder) == ["step-00000010-0003", "step-00000011"]
