"""The checkpoints of a stage. Each is a transaction: it exists completely or not at all."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.run.files import fsync_path, write_atomically
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.runtime.world import World

# Puts a rank's share of a checkpoint into a snapshot. Collective.
Take = Callable[[Snapshot], None]

STEP_FOLDER = re.compile(r"step-\d{8}(-\d{4})?")
# Bytes left free beside a checkpoint: for its manifest, logs and metrics.
SPARE = 8 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: steps done.
        state: the stage's own entry in the manifest.
        part: parts done of the next step.
    """

    step: int
    folder: Path
    state: dict[str, Any]
    part: int = 0


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written."""

    folder: Path
    target: Path
    facts: dict[str, Any]
    files: Future[dict[str, Any]]  # of this rank, once they are written


@dataclass
class CheckpointStore:
    """Saves and finds a stage's checkpoints on the shared file system. All methods are collective.

    Every rank writes into a temporary folder; rank 0 commits it by its manifest and a rename, unless
    another attempt has claimed the stage since.

    Attributes:
        ranks_here: ranks that share a machine's memory.
    """

    folder: Path
    attempt: str
    keep: int
    world: World
    ranks_here: int = 1

    def __post_init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None
        self._pruning: Future[None] | None = None
        self._owner = self.folder / "owner"

    def claim(self) -> None:
        """Make this attempt the stage's owner, so that earlier attempts can no longer commit."""

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._owner, self.attempt, durable=True)
            for leftover in self.folder.glob("tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)

        self.world.on_main(write)

    def check_owner(self) -> None:
        """Raise HpcRlhfError if another attempt has claimed the stage."""
        owner = self._owner.read_text()
        if owner != self.attempt:
            raise HpcRlhfError(
                f"attempt {self.attempt} no longer owns this stage: {owner} does",
                where=str(self.folder),
                hint="nothing is lost; the other attempt continues",
                exit_code=RUN_FAILED,
            )

    def begin(self, step: int, take: Take, state: dict[str, Any], part: int = 0, copy: bool = True) -> bool:
        """Take a checkpoint of a place and begin to write it, unless there is one already.

        Args:
            state: JSON that comes back with the checkpoint.
            copy: copy the state, and write it in the background.

        Returns:
            Whether a checkpoint was begun. Then ``finish`` has to follow.

        Raises:
            HpcRlhfError: another attempt owns the stage, or the file system is full or fails. Older checkpoints stay.
        """
        assert self._writing is None
        name = f"{step:08d}-{part:04d}" if part else f"{step:08d}"
        target = self.folder / f"step-{name}"
        partial = self.folder / f"tmp-{name}-{self.attempt}"

        def make_folder() -> bool:
            self.check_owner()
            if target.exists():
                return False
            partial.mkdir(parents=True)
            return True

        if not self.world.on_main(make_folder):
            return False
        snapshot = Snapshot(partial, copy, self.ranks_here)
        take(snapshot)
        size = sum(self.world.gather(snapshot.size))
        self.world.on_main(lambda: self._check_room(size, target))
        ranks = {"world_size": self.world.size, "data_ranks": self.world.dims.data}
        facts = {"step": step, "part": part, "attempt": self.attempt, **ranks, "state": state}
        self._writing = _Writing(partial, target, facts, self._writer.submit(snapshot.write))
        if snapshot.live:
            wait([self._writing.files])
        return True

    def _check_room(self, size: int, target: Path) -> None:
        free = shutil.disk_usage(self.folder).free
        if size * 1.01 + SPARE > free:
            raise HpcRlhfError(
                f"the checkpoint needs {_gigabytes(size)}, and {_gigabytes(free)} are free",
                where=str(target),
                hint="free some space and run the stage again; it continues from the previous checkpoint",
                exit_code=RUN_FAILED,
            )

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and is not finished; the same on all ranks."""
        return self._writing is not None

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._writing is None or self._writing.files.done()

    def finish(self) -> None:
        """Wait until every rank has written, and commit the checkpoint.

        Raises:
            HpcRlhfError: the file system failed on any rank, or another attempt owns the stage.
        """
        writing, self._writing = self._writing, None
        assert writing is not None
        failure, files = None, {}
        try:
            files = writing.files.result()
        except OSError as error:
            failure = f"rank {self.world.rank} on {socket.gethostname()}: {error}"
        shares = self.world.gather((files, failure))
        errors = [error for _, error in shares if error]
        if errors:
            self.world.on_main(lambda: shutil.rmtree(writing.folder, ignore_errors=True))
            raise HpcRlhfError(
                f"the checkpoint could not be written: {errors[0]}",
                where=str(writing.target),
                hint="fix it, or free some space, and run the stage again; it continues from the previous checkpoint",
                exit_code=RUN_FAILED,
            )

        def commit() -> None:
            manifest.write(writing.folder, writing.facts, {k: f for share, _ in shares for k, f in share.items()})
            self.check_owner()
            writing.folder.rename(writing.target)
            fsync_path(self.folder)

        self.world.on_main(commit)
        if self.world.is_main:
            self._pruning = self._writer.submit(self._prune)

    def wait_until_idle(self) -> None:
        """Finish what has been begun. Collective."""
        if self._writing is not None:
            self.finish()
        if self._pruning is not None:
            wait([self._pruning])

    def _prune(self) -> None:
        for folder in self._steps()[self.keep :]:
            (folder / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """The folders of checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if STEP_FOLDER.fullmatch(p.name)), reverse=True)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, newest first, verified or not. Not collective."""
        return [int(folder.name.split("-")[1]) for folder in self._steps()]

    def latest(self) -> Checkpoint | None:
        """The newest valid checkpoint that these ranks can resume from, if there is one; moves torn ones aside.

        Any number of ranks can resume between steps; in the middle of a step, only as many as saved it.

        Raises:
            HpcRlhfError: there are or were checkpoints, but none is usable.
        """
        ranks, data_ranks = self.world.size, self.world.dims.data
        mid_step_ranks, first_defect = None, ""
        for name in self.world.on_main(lambda: [folder.name for folder in self._steps()]):
            folder = self.folder / name
            own_defect = manifest.defect(folder, share=(self.world.rank, self.world.size))
            if defects := [defect for defect in self.world.gather(own_defect) if defect]:
                self.world.on_main(partial(_set_aside, folder))
                first_defect = first_defect or f"; of {folder.name}, {defects[0]}"
                continue
            facts = manifest.read(folder)
            assert facts is not None
            # Earlier versions did not write data_ranks.
            if not facts["part"] or (facts["world_size"], facts.get("data_ranks", data_ranks)) == (ranks, data_ranks):
                return Checkpoint(facts["step"], folder, facts["state"], facts["part"])
            mid_step_ranks = mid_step_ranks or facts["world_size"]
        if mid_step_ranks is not None:
            raise HpcRlhfError(
                f"the last checkpoints were made by {mid_step_ranks} ranks in the middle of a step",
                where=str(self.folder),
                hint=f"run it on {mid_step_ranks} ranks, with the same tensor_parallel and sequence_parallel, until "
                "the step is done; then any number can continue",
            )
        torn = self.world.on_main(lambda: len(list(self.folder.glob("torn-*"))))
        if torn:
            raise HpcRlhfError(
                f"none of the {torn} checkpoints is valid{first_defect}",
                where=str(self.folder),
                hint="they are kept as torn-*: restore one under its old name, or remove them to start over",
                exit_code=RUN_FAILED,
            )
        return None


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _set_aside(folder: Path) -> None:
    target = folder.with_name(f"torn-{folder.name}")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
