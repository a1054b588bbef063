"""Runs chains of stages on the same ranks: loading DeepSpeed takes longer than the stages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_rlhf.rank import exit_after
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.load import read_spec
from tests.train.ranks import start, wait


def run_chains(runs: Sequence[RunDir], ranks: int) -> None:
    """Run all stages of each run on the same ranks.

    Raises:
        AssertionError: a rank failed; it holds the ends of their logs.
    """
    logs = [runs[0].path.parent / f"ranks-{ranks}.{rank}.log" for rank in range(ranks)]
    wait(start(["-m", "tests.train.grid", *(str(run.path) for run in runs)], logs), logs)


def main() -> None:
    """One rank."""
    from hpc_rlhf.train.entry import Attempt
    from hpc_rlhf.train.runtime import world as worlds
    from hpc_rlhf.train.runtime.launcher import launcher_ranks
    from hpc_rlhf.train.runtime.stop_signals import StopFlag

    world = worlds.join(launcher_ranks()[1])
    for path in sys.argv[1:]:
        run = RunDir(Path(path))
        spec = read_spec(run.job_yaml)
        for stage in spec.stage_names:
            attempt = Attempt(run, stage, StopFlag())
            attempt.name = f"{run.path.name}-{stage}"  # the same on all ranks
            attempt.train(spec, world)
    worlds.leave()


if __name__ == "__main__":
    exit_after(main)
