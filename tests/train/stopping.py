"""Runs stages on ranks that start but once, and stops each attempt after a number of the rounds in which ranks agree."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from hpc_rlhf.rank import end_after
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import read_spec
from tests.train.stages import run_ranks

TIME_LIMIT = 1
# After how many rounds an attempt is told to stop: of all from its first safe point on, or of those of one kind.
Stop = int | tuple[str, int]
# The kind of round in which rank 0 alone is told: as it describes a file of the artifact.
FILES = "files"


def run_stopping(work: Sequence[tuple[RunDir, str, Sequence[Stop]]], ranks: int) -> None:
    """Run stages, each with the stops of its attempts. The attempt after the last of those goes on to the end.

    Raises:
        AssertionError: a rank failed; it holds the ends of their logs.
    """
    logs = [work[0][0].path.parent / f"ranks.{rank}.log" for rank in range(ranks)]
    tasks = json.dumps([(str(run.path), stage, stops) for run, stage, stops in work])
    run_ranks("tests.train.stopping", [tasks], logs)


def main() -> None:
    """One rank."""
    from hpc_rlhf.run import manifest
    from hpc_rlhf.train.checkpoint.checkpointer import Checkpointer
    from hpc_rlhf.train.entry import Attempt
    from hpc_rlhf.train.runtime import consensus
    from hpc_rlhf.train.runtime import world as worlds
    from hpc_rlhf.train.runtime.launcher import launcher_ranks
    from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag

    world = worlds.join(launcher_ranks()[1])
    consensus.MIN_INTERVAL = consensus.MAX_INTERVAL = 0.0  # a round between all pieces of work
    agree, between = consensus.Consensus.agree, consensus.Consensus.agree_between
    safe_point = Checkpointer.safe_point
    describe = manifest.describe

    for path, stage, stops in json.loads(sys.argv[1]):
        run = RunDir(Path(path))
        spec = read_spec(run.job_yaml)
        for number, stop in enumerate([*stops, None]):
            kind, after = stop if isinstance(stop, list) else ("", stop)
            rounds, files, asked, flag = count(1), count(1), [""], StopFlag()
            begun = [False]

            def first_point(self: Any, *args: Any, begun: Any = begun) -> None:
                begun[0] = True
                safe_point(self, *args)

            def asking(self: Any, kind: str, numbers: Any, asked: Any = asked) -> Any:
                asked[0] = kind
                said = between(self, kind, numbers)
                asked[0] = ""
                return said

            def now(
                self: Any, numbers: Any, kind: Any = kind, after: Any = after, rounds: Any = rounds,
                begun: Any = begun, asked: Any = asked, flag: Any = flag,
            ) -> list[int]:  # fmt: skip
                counts = begun[0] and kind in ("", asked[0])
                if counts and next(rounds) == after and world.rank == world.size - 1:
                    flag.time_is_up()
                    numbers = [TIME_LIMIT, *numbers[1:]]
                return agree(self, numbers)

            def described(
                folder: Path, *share: Any,
                kind: Any = kind, after: Any = after, files: Any = files, flag: Any = flag,
            ) -> Any:  # fmt: skip
                if kind == FILES and folder.name.startswith("model-") and next(files) == after:
                    flag.time_is_up()
                return describe(folder, *share)

            Checkpointer.safe_point = first_point  # type: ignore[method-assign]
            consensus.Consensus.agree, consensus.Consensus.agree_between = now, asking  # type: ignore[method-assign]
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
    end_after(main)
