"""The loop of docs/feedback.md on the demo: ``python -m tests.loop FOLDER`` prints its figures. With --slurm, the test
cluster trains all rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.cluster import Cluster
from tests.cluster.chain import Chain
from tests.loop.loop import hpc_rlhf, like, next_round, run_here

JOB = Path(__file__).parents[2] / "jobs/tiny.yaml"
SECONDS = 3600  # for a round on the cluster


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.loop", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs go; a new one")
    parser.add_argument("--slurm", action="store_true")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if not args.slurm:
        loop(folder, run_here)
        return
    with Cluster(Path(tempfile.mkdtemp(prefix="hpc-rlhf-slurm-")), owner=os.getpid()) as cluster:

        def submit(spec: Path, run: Path) -> None:
            chain = Chain(cluster, spec, run)
            chain.submit()
            chain.wait_done("eval", SECONDS)

        loop(folder, submit)


def loop(folder: Path, train: Callable[[Path, Path], None]) -> None:
    first = folder / "tiny"
    train(JOB, first)
    print(hpc_rlhf("status", first), flush=True)
    for models, kind, stage in ((["ppo", "ppo"], "pairs", "ppo"), (["ppo"], "thumbs", "kto")):
        run = next_round(first, folder / kind, models, train=train)
        before = run.path.with_name(first.name)
        print(hpc_rlhf("feedback", before))
        print(hpc_rlhf("compare", before, run.path))
        share = like(run, stage)
        wins = f"{share.estimate:.0%} ({share.low:.0%} to {share.high:.0%})"
        print(f"{kind}: {stage} wins {wins} by the voters' taste\n", flush=True)


if __name__ == "__main__":
    main()
