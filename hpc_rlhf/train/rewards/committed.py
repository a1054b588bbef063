"""Scores that may differ when computed again, stored on disk before anything learns from them.

A server, or a user's function, may give another score the next time. An attempt that repeats a step, perhaps on another
number of ranks, reuses its scores and asks nobody twice.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from hpc_rlhf.run.files import fsync_path, make_folder
from hpc_rlhf.train.checkpoint.store import CheckpointStore
from hpc_rlhf.train.rewards.text import Score, decoded, encoded
from hpc_rlhf.train.runtime.world import World

# Scores all of this rank's responses, or none. Collective.
Ask = Callable[[bool], Sequence[Score]]


class CommittedScores:
    """The scores from a stage's rewards, in a file for each step. A line holds what one reward returned in one call, on
    all ranks.

    Args:
        checkpoints: the stage's; files for steps that no checkpoint would repeat are deleted.
    """

    def __init__(self, folder: Path, checkpoints: CheckpointStore, world: World) -> None:
        self.folder, self.checkpoints, self.world = folder, checkpoints, world
        self._file: Path | None = None
        self._known: dict[str, dict[str, Any]] = {}
        self._calls: Counter[str] = Counter()

    def begin(self, step: int, purpose: str) -> None:
        """Open a step's file; see ``Blend.begin``. Collective."""
        file = self.folder / f"{step:08d}-{purpose}.jsonl"

        def read() -> dict[str, dict[str, Any]]:
            make_folder(self.folder)
            oldest = min(self.checkpoints.steps, default=0)
            for other in self.folder.glob("*.jsonl"):
                if int(other.name.partition("-")[0]) < oldest:
                    other.unlink(missing_ok=True)
            return _read(file) if file.exists() else {}

        self._known = self.world.on_main(read)
        self._file, self._calls = file, Counter()

    def replayed(self, reward: str, rows: Sequence[Any], keeps_failures: bool, ask: Ask) -> Sequence[Score]:
        """The scores of this rank's responses: those on disk if all are there, otherwise new ones, which it stores.
        Collective.

        Args:
            rows: what the score of each response depends on, as JSON.
            keeps_failures: whether failures are stored, too. Otherwise, a call with one is not stored at all.
        """
        if self._file is None:
            return ask(True)
        call = f"{reward} {self._calls[reward]}"
        self._calls[reward] += 1
        known, keys = self._known.get(call, {}), self._keys(rows)
        missing = any(key not in known for key in keys)
        scores = encoded(ask(missing))
        new = dict(zip(keys, scores, strict=True)) if missing else {}
        gathered = dict(chain.from_iterable(each.items() for each in self.world.gather_data(new)))
        if gathered and (keeps_failures or not any(isinstance(score, list) for score in gathered.values())):
            self._known[call] = {**known, **gathered}
            self.world.on_main(lambda: self._append(call, gathered))
        return decoded([new[key] if missing else known[key] for key in keys])

    def _keys(self, rows: Sequence[Any]) -> list[str]:
        """A name for each of this rank's responses, by its content, and by its place among all that are the same."""
        digests = [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:32] for row in rows]
        seen = Counter(chain.from_iterable(self.world.gather_data(digests)[: self.world.data_rank]))
        keys = []
        for digest in digests:
            seen[digest] += 1
            keys.append(f"{digest}-{seen[digest]}")
        return keys

    def _append(self, call: str, scores: Mapping[str, Any]) -> None:
        assert self._file is not None
        self.checkpoints.check_owner()
        is_new = not self._file.exists()
        with self._file.open("a", encoding="utf-8") as file:
            # A line that a crash cut short ends here.
            file.write("\n" + json.dumps({"call": call, "scores": scores}) + "\n")
        fsync_path(self._file)
        if is_new:
            fsync_path(self.folder)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The scores in a file, by call; incomplete lines are left out."""
    calls: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, LookupError, TypeError):
            fields = json.loads(line)
            calls.setdefault(fields["call"], {}).update(fields["scores"])
    return calls
