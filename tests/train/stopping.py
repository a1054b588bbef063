"""Runs many stages on the same ranks, and stops each attempt after a number of consensus rounds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from hpc_rlhf.rank import exit_after
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import read_spec
from tests.train.ranks import start, wait

TIME_LIMIT = 1
# After how many rounds an attempt should stop: of all from its first safe point on, or of those of one kind.
Stop = int | tuple[str, int]
# The kind of round in which rank 0 alone should stop: while it hashes a file of the artifact.
FILES = "files"


def run_stopping(work: Sequence[tuple[RunDir, str, Sequence[Stop]]], ranks: int) -> None:
    """Run stages, each with the stops of its attempts. The attempt after the last of those runs to the end.

    Raises:
        AssertionError: a rank failed; it contains the ends of their logs.
    """
    logs = [work[0][0].path.parent / f"ranks.{rank}.log" for rank in range(ranks)]
    tasks = json.dumps([(str(run.path), stage, stops) for run, stage, stops in work])
    wait(start(["-m", "tests.train.stopping", tasks], logs), logs)


def main() -> None:
    """One rank."""
    from hpc_rlhf.run import manifest
    from hpc_rlhf.train.checkpoint.checkpointer import Checkpointer
    from hpc_rlhf.train.entry import Attempt
    from hpc_rlhf.train.runtime import stop_control
    from hpc_rlhf.train.runtime import world as worlds
    from hpc_rlhf.train.runtime.launcher import launcher_ranks
    from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag

    world = worlds.join(launcher_ranks()[1])
    stop_control.MIN_INTERVAL = stop_control.MAX_INTERVAL = 0.0  # a round between all pieces of work
    agree, between = stop_control.Consensus.agree, stop_control.Consensus.agree_between
    safe_point = Checkpointer.safe_point
    describe = manifest.describe

    for path, stage, stops in json.loads(sys.argv[1]):
        run = RunDir(Path(path))
        spec = read_spec(run.job_yaml)
        for number, stop in enumerate([*stops, None]):
            kind, after = stop if isinstance(stop, list) else ("", stop)
            rounds, files, round_kind, flag = count(1), count(1), [""], StopFlag()
            started = [False]

            def first_point(self: Any, *args: Any, started: Any = started) -> None:
                started[0] = True
                safe_point(self, *args)

            def agree_between(self: Any, kind: str, numbers: Any, round_kind: Any = round_kind) -> Any:
                round_kind[0] = kind
                largest = between(self, kind, numbers)
                round_kind[0] = ""
                return largest

            def agree_now(
                self: Any, numbers: Any, kind: Any = kind, after: Any = after, rounds: Any = rounds,
                started: Any = started, round_kind: Any = round_kind, flag: Any = flag,
            ) -> list[int]:  # fmt: skip
                counts = started[0] and kind in ("", round_kind[0])
                if counts and next(rounds) == after and world.rank == world.size - 1:
                    flag.expire()
                    numbers = [TIME_LIMIT, *numbers[1:]]
                return agree(self, numbers)

            def described(
                folder: Path, *share: Any,
                kind: Any = kind, after: Any = after, files: Any = files, flag: Any = flag,
            ) -> Any:  # fmt: skip
                if kind == FILES and folder.name.startswith("model-") and next(files) == after:
                    flag.expire()
                return describe(folder, *share)

            Checkpointer.safe_point = first_point  # type: ignore[method-assign]
            stop_control.Consensus.agree, stop_control.Consensus.agree_between = agree_now, agree_between  # type: ignore[method-assign]
            manifest.describe = described
            try:
                attempt = Attempt(run, stage, flag)
                attempt.name = f"{run.path.name}-{stage}-{number}"  # the same on all ranks
                attempt.train(spec, world)
            except StageStopped:
                assert not run.stage(stage).model.exists()
                continue
            break
    worlds.leave()


if __name__ == "__main__":
    exit_after(main)
