"""Runs stages on ranks that start but once, and stops each attempt after a number of the rounds in which ranks agree."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from hpc_rlhf.rundir import RunDir
from hpc_rlhf.spec.load import read_spec
from tests.train.stages import run_ranks

TIME_LIMIT = 1


def run_stopping(work: Sequence[tuple[RunDir, str, list[int]]], ranks: int) -> None:
    """Run stages, each with stops: after how many rounds its attempts are told to stop, from their first safe point on.

    The attempt after the last of those goes on to the end.

    Raises:
        AssertionError: a rank failed; it holds the ends of their logs.
    """
    logs = [work[0][0].path.parent / f"ranks.{rank}.log" for rank in range(ranks)]
    tasks = json.dumps([(str(run.path), stage, stops) for run, stage, stops in work])
    run_ranks("tests.train.stopping", [tasks], logs)


def main() -> None:
    """One rank."""
    from hpc_rlhf.train import context, polls
    from hpc_rlhf.train import world as worlds
    from hpc_rlhf.train.entry import Attempt
    from hpc_rlhf.train.preemption import StageStopped, StopFlag

    world = worlds.join(worlds.launcher_ranks()[1])
    polls.BETWEEN = polls.MOST = 0.0  # a round between all pieces of work
    ask, safe_point = polls.Polls.now, context.StageContext.safe_point

    for path, stage, stops in json.loads(sys.argv[1]):
        run = RunDir(Path(path))
        spec = read_spec(run.job_yaml)
        for number, stop in enumerate([*stops, None]):
            rounds, begun = count(1), [False]

            def first_point(self: Any, *args: Any, begun: Any = begun) -> None:
                begun[0] = True
                safe_point(self, *args)

            def now(
                self: Any, numbers: Any, stop: Any = stop, rounds: Any = rounds, begun: Any = begun
            ) -> list[int]:
                told = begun[0] and next(rounds) == stop and world.rank == world.size - 1
                return ask(self, [TIME_LIMIT, *numbers[1:]] if told else numbers)

            context.StageContext.safe_point = first_point  # type: ignore[method-assign]
            polls.Polls.now = now  # type: ignore[method-assign]
            try:
                Attempt(run, stage, StopFlag(), name=f"attempt-{number}").train(spec, world)
            except StageStopped:
                continue
            break
    worlds.leave()


if __name__ == "__main__":
    main()
