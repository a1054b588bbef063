"""The checkpoints of a stage: each one a transaction that is there whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpc_rlhf import manifest
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.world import World

STEP_FOLDER = re.compile(r"step-\d{8}(-\d{4})?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified.

    Attributes:
        step: steps done.
        state: what the stage itself put into the manifest.
        part: parts done of the step after those.
    """

    step: int
    folder: Path
    state: dict[str, Any]
    part: int = 0


class CheckpointStore:
    """Saves and finds a stage's checkpoints on the shared file system. All its methods are collective.

    Every rank writes into a temporary folder; rank 0 commits it by its manifest and a rename, unless
    another attempt has claimed the stage since.
    """

    def __init__(self, folder: Path, attempt: str, keep: int, world: World) -> None:
        self.folder = folder
        self.attempt = attempt
        self.keep = keep
        self.world = world

    @property
    def _owner(self) -> Path:
        return self.folder / "owner"

    def claim(self) -> None:
        """Make this attempt the stage's owner. From now on, an earlier attempt cannot commit."""

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".owner-{self.attempt}"
            partial.write_text(self.attempt)
            manifest.fsync_path(partial)
            partial.rename(self._owner)
            for left in self.folder.glob("tmp-*"):
                shutil.rmtree(left, ignore_errors=True)

        self.world.on_main(write)

    def check_owner(self) -> None:
        """Raises HpcRlhfError where another attempt has claimed the stage."""
        owner = self._owner.read_text()
        if owner != self.attempt:
            raise HpcRlhfError(
                f"attempt {self.attempt} no longer owns this stage: {owner} does",
                where=str(self.folder),
                hint="nothing is lost; the other attempt goes on",
                exit_code=RUN_FAILED,
            )

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any], part: int = 0) -> bool:
        """Save a checkpoint, if there is none of this place yet.

        Args:
            step: steps done.
            write: writes this rank's share into the folder it is given; collective.
            state: JSON that comes back with the checkpoint.
            part: parts done of the step after those.

        Returns:
            Whether there was none yet.

        Raises:
            HpcRlhfError: another attempt owns the stage, or the file system refuses. Older checkpoints
                are as they were.
        """
        name = f"{step:08d}-{part:04d}" if part else f"{step:08d}"
        target = self.folder / f"step-{name}"
        partial = self.folder / f"tmp-{name}-{self.attempt}"

        def begin() -> bool:
            self.check_owner()
            if target.exists():
                return False
            partial.mkdir(parents=True)
            return True

        if not self.world.on_main(begin):
            return False
        write(partial)
        self.world.barrier()
        shares = self.world.gather(manifest.describe(partial, (self.world.rank, self.world.size)))

        def commit() -> None:
            files = {name: fact for share in shares for name, fact in share.items()}
            facts = {
                "step": step, "part": part, "attempt": self.attempt, "world_size": self.world.size, "state": state,
            }  # fmt: skip
            manifest.write(partial, facts, files)
            self.check_owner()
            partial.rename(target)
            manifest.fsync_path(self.folder)
            self._prune()

        self.world.on_main(commit)
        return True

    def _prune(self) -> None:
        for folder in self._steps()[self.keep :]:
            (folder / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """The folders of checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if STEP_FOLDER.fullmatch(p.name)), reverse=True)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; torn ones are set aside. None where a stage has none yet.

        Raises:
            HpcRlhfError: there are checkpoints, or were, and none of them is whole; or they belong to
                another number of ranks.
        """
        for folder in self.world.on_main(self._steps):
            mine = manifest.defect(folder, share=(self.world.rank, self.world.size))
            defects = [defect for defect in self.world.gather(mine) if defect]
            if not defects:
                return self._opened(folder)
            self.world.on_main(partial(_set_aside, folder))
        torn = self.world.on_main(lambda: len(list(self.folder.glob("torn-*"))))
        if torn:
            raise HpcRlhfError(
                f"none of the {torn} checkpoints is whole",
                where=str(self.folder),
                hint="they are kept as torn-*: restore one under its old name, or remove them to start the stage anew",
                exit_code=RUN_FAILED,
            )
        return None

    def _opened(self, folder: Path) -> Checkpoint:
        facts = manifest.read(folder)
        assert facts is not None
        if facts["world_size"] != self.world.size:
            raise HpcRlhfError(
                f"the checkpoint was made by {facts['world_size']} ranks and this attempt has {self.world.size}",
                where=str(folder),
                hint="submit with the same nodes and GPUs as before",
                exit_code=RUN_FAILED,
            )
        return Checkpoint(facts["step"], folder, facts["state"], facts.get("part", 0))


def _set_aside(folder: Path) -> None:
    target = folder.with_name(f"torn-{folder.name}")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
