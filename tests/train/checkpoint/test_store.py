"""Checkpoints exist completely or not at all, and damage never silently restarts a stage."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.train.checkpoint import snapshot as snapshots
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.checkpoint.store import CheckpointStore
from hpc_rlhf.train.runtime.stop_signals import StopFlag
from hpc_rlhf.train.runtime.world import World


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "stages" / "sft" / "checkpoints"


@pytest.fixture
def store(folder: Path, world: World) -> CheckpointStore:
    made = CheckpointStore(folder, "1-0", keep=2, world=world)
    made.claim()
    return made


def writing(text: str) -> Any:
    def take(snapshot: Snapshot) -> None:
        snapshot.data("engine/weights.pt", text.encode())

    return take


def save_now(store: CheckpointStore, step: int, take: Any, state: dict[str, Any], part: int = 0) -> bool:
    """Save while training waits; False if that place is saved already."""
    begun = store.begin(step, take, state, part, copy=False)
    if begun:
        store.finish()
    return begun


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        save_now(store, step, writing(f"weights of {step}"), {"loss": step / 2})
    store.wait_until_idle()


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


def test_a_new_stage_has_no_checkpoint(store: CheckpointStore, folder: Path, world: World) -> None:
    assert store.latest() is None
    assert CheckpointStore(folder / "nowhere", "1-0", 2, world).latest() is None


def test_the_latest_is_returned_with_its_state(store: CheckpointStore, folder: Path) -> None:
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
def test_a_torn_checkpoint_is_moved_aside_and_the_previous_one_used(
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
def test_if_all_are_torn_no_attempt_starts_over(store: CheckpointStore, folder: Path, world: World, how: str) -> None:
    save(store, 10, 20)
    for name in names(folder):
        damage(folder / name, how)
    for attempt in ("1-0", "1-1", "2-0"):  # each requeue is another attempt
        later = CheckpointStore(folder, attempt, keep=2, world=world)
        with pytest.raises(HpcRlhfError, match="none of the 2 checkpoints is valid") as caught:
            later.latest()
        assert caught.value.where == str(folder)
        assert caught.value.exit_code == RUN_FAILED
    for name in names(folder):
        (folder / name).rename(folder / f"moved-{name}")
    assert store.latest() is None, "once they are out of the way, as the hint says"


def test_between_steps_any_number_of_ranks_can_resume(store: CheckpointStore, folder: Path) -> None:
    save(store, 10)
    made_by(folder / "step-00000010", world_size=4)
    found = store.latest()
    assert found is not None
    assert found.step == 10


@pytest.mark.parametrize("layout", [{"world_size": 4}, {"data_ranks": 2}])
def test_in_mid_step_only_the_same_number_of_ranks_can_resume(
    store: CheckpointStore, folder: Path, layout: dict[str, int]
) -> None:
    save(store, 10)
    assert save_now(store, 10, writing("later"), {"loss": 1.0}, part=1)
    made_by(folder / "step-00000010-0001", **layout)
    found = store.latest()
    assert found is not None
    assert (found.step, found.part) == (10, 0)
    shutil.rmtree(folder / "step-00000010")
    with pytest.raises(HpcRlhfError, match=rf"made by {layout.get('world_size', 1)} ranks in the middle of a step"):
        store.latest()
    assert names(folder) == ["step-00000010-0001"], "it is valid, and kept"


def made_by(target: Path, **layout: int) -> None:
    manifest.write(target, {**manifest.require(target, "it"), **layout})


def test_only_the_newest_are_kept_and_other_files_are_left_alone(store: CheckpointStore, folder: Path) -> None:
    (folder / "step-notes").mkdir()
    save(store, 10, 20, 30, 40)
    assert names(folder) == ["step-00000030", "step-00000040", "step-notes"]


def test_a_saved_step_is_not_saved_again(store: CheckpointStore) -> None:
    assert save_now(store, 10, writing("first"), {"loss": 5.0})

    def never(snapshot: Snapshot) -> None:
        pytest.fail("written again")

    assert not save_now(store, 10, never, {"loss": 99.0})
    found = store.latest()
    assert found is not None
    assert found.state == {"loss": 5.0}


@pytest.mark.parametrize("step", [10, 20])
def test_an_attempt_that_lost_the_stage_cannot_save(
    store: CheckpointStore, folder: Path, world: World, step: int
) -> None:
    """Neither a new step nor one that the owner has saved: it has to find out that it must end."""
    newer = CheckpointStore(folder, "1-1", keep=2, world=world)
    newer.claim()
    save(newer, 10)
    with pytest.raises(HpcRlhfError, match="attempt 1-0 no longer owns this stage: 1-1 does"):
        save(store, step)
    assert names(folder) == ["step-00000010"]
    found = newer.latest()
    assert found is not None
    assert manifest.require(found.folder, "it")["attempt"] == "1-1"


def test_an_attempt_that_loses_the_stage_while_writing_does_not_commit(
    store: CheckpointStore, folder: Path, world: World
) -> None:
    save(store, 10)
    newer = CheckpointStore(folder, "1-1", keep=2, world=world)

    def take(snapshot: Snapshot) -> None:
        writing("stale")(snapshot)
        (folder / "owner").write_text("1-1")  # a claim whose cleanup has not seen this folder yet

    with pytest.raises(HpcRlhfError, match="no longer owns"):
        save_now(store, 20, take, {})
    found = newer.latest()
    assert found is not None
    assert found.step == 10
    newer.claim()
    assert names(folder) == ["step-00000010"], "what is left of it goes with the next claim"


@pytest.mark.parametrize("when", ["writing", "committing"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_failing_file_system_leaves_the_older_checkpoint_and_no_partial_one(
    store: CheckpointStore, folder: Path, world: World, when: str, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 10)

    def refuse(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    if when == "committing":
        monkeypatch.setattr(manifest, "write", refuse)
    else:
        monkeypatch.setattr("hpc_rlhf.train.checkpoint.snapshot.os.fsync", refuse)
    with pytest.raises(HpcRlhfError, match=os.strerror(error)) as caught:
        save(store, 20)
    assert caught.value.exit_code == RUN_FAILED
    monkeypatch.undo()
    later = CheckpointStore(folder, "1-1", keep=2, world=world)
    later.claim()
    assert names(folder) == ["step-00000010"]
    found = later.latest()
    assert found is not None
    assert found.step == 10


def test_a_checkpoint_that_does_not_fit_is_not_begun(small_disk: Path, world: World) -> None:
    store = CheckpointStore(small_disk / "checkpoints", "1-0", keep=2, world=world)
    store.claim()
    state = {"weights": torch.zeros(1024, 1024)}
    save_now(store, 1, lambda snapshot: snapshot.tensors("a.safetensors", state), {})
    state["more"] = torch.zeros(4 * 1024, 1024)
    with pytest.raises(HpcRlhfError, match=r"needs .*, and .* are free"):
        save_now(store, 2, lambda snapshot: snapshot.tensors("a.safetensors", state), {})
    found = store.latest()
    assert found is not None
    assert found.step == 1


def test_a_disk_that_fills_up_during_a_save_gets_its_space_back(
    small_disk: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_rlhf.train.checkpoint.store.CheckpointStore._check_room", lambda *_: None)
    store = CheckpointStore(small_disk / "checkpoints", "1-0", keep=2, world=world)
    store.claim()
    state = {"weights": torch.zeros(1024, 1024)}
    save_now(store, 1, lambda snapshot: snapshot.tensors("a.safetensors", state), {})
    large = {"weights": torch.zeros(8 * 1024, 1024)}
    with pytest.raises(HpcRlhfError, match=r"could not be written: rank 0 on .*No space left on device") as caught:
        save_now(store, 2, lambda snapshot: snapshot.tensors("a.safetensors", large), {})
    assert "free some space" in str(caught.value)
    assert names(small_disk / "checkpoints") == ["step-00000001"]
    found = store.latest()
    assert found is not None
    assert load_file(found.folder / "a.safetensors")["weights"].shape == (1024, 1024)


def test_training_continues_while_a_checkpoint_is_written(store: CheckpointStore) -> None:
    """The checkpoint has the state at the time of the snapshot, whatever training changed since."""
    weights = torch.ones(1000)
    part = weights[100:200]
    may_write = threading.Event()

    def take(snapshot: Snapshot) -> None:
        snapshot.tensors("engine.safetensors", {"weights": weights, "part": part})
        files = snapshot.write
        snapshot.write = lambda: may_write.wait() and files()  # type: ignore[method-assign]

    assert store.begin(7, take, {"at": 7})
    assert not store.written
    assert store.pending
    weights.zero_()
    may_write.set()
    store.finish()
    assert not store.pending
    found = store.latest()
    assert found is not None
    saved = load_file(found.folder / "engine.safetensors")
    assert (saved["weights"].sum(), saved["part"].sum()) == (1000, 100)


def test_if_memory_is_short_training_waits_for_the_write(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "free_memory", lambda: 1000.0)
    state = {"weights": torch.ones(1000)}
    assert store.begin(7, lambda snapshot: snapshot.tensors("engine.safetensors", state), {})
    assert store.written, "before training goes on"
    store.finish()


def test_a_part_of_a_step_is_ordered_between_steps(store: CheckpointStore, folder: Path) -> None:
    save_now(store, 10, writing("a"), {})
    save_now(store, 10, writing("b"), {}, part=3)
    found = store.latest()
    assert found is not None
    assert (found.step, found.part) == (10, 3)
    save_now(store, 11, writing("c"), {})
    found = store.latest()
    assert found is not None
    assert (found.step, found.part) == (11, 0)
    store.wait_until_idle()
    assert names(folder) == ["step-00000010-0003", "step-00000011"]


def test_tensors_of_every_type_and_shape_round_trip(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float32)
    tensors = {
        "views": whole[2:5], "turned": whole.view(3, 4).t(), "one": torch.tensor(2.5), "none": torch.empty(0, 3),
        "tokens": torch.tensor([1, 2]), "mask": torch.tensor([[True], [False]]), "half": whole.bfloat16(),
    }  # fmt: skip
    snapshot = Snapshot(tmp_path)
    snapshot.tensors("a/b.safetensors", tensors)
    facts = snapshot.write()
    assert facts == manifest.describe(tmp_path)
    assert snapshot.size == sum(tensor.nbytes for tensor in tensors.values())
    found = load_file(tmp_path / "a" / "b.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


def test_more_signals_during_a_save_do_no_harm(store: CheckpointStore) -> None:
    """The first signal started the save; repeated and stronger ones change nothing."""
    signals = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}
    flag = StopFlag()
    flag.install()

    def take(snapshot: Snapshot) -> None:
        snapshot.tensors("a.safetensors", {"weights": torch.ones(1000)})
        files = snapshot.write

        def write() -> dict[str, Any]:
            for number in signals:
                os.kill(os.getpid(), number)
            return files()

        snapshot.write = write  # type: ignore[method-assign]

    try:
        save_now(store, 5, take, {})
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert flag.code == 3
    found = store.latest()
    assert found is not None
    assert found.step == 5
