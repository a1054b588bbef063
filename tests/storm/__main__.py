"""``python -m tests.storm --faults 200 --seed 1``: runs a chain undisturbed and under faults, and compares."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.cluster import Cluster
from tests.storm.run import Weather, weather
from tests.storm.scenarios import GRPO, PARALLEL, PPO, VLLM


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--keep", type=Path, help="a folder for copies of the runs")
    parser.add_argument("--peace", type=Path, help="the run in peace that was kept, in place of a new one")
    parser.add_argument("--here", action="store_true", help="without Slurm: hpc-rlhf run in place of submit")
    scenario = parser.add_mutually_exclusive_group()
    scenario.add_argument("--grpo", dest="scenario", action="store_const", const=GRPO, help="with GRPO in place of PPO")
    scenario.add_argument("--vllm", dest="scenario", action="store_const", const=VLLM, help="GRPO alone, with vLLM")
    scenario.add_argument("--3d", dest="scenario", action="store_const", const=PARALLEL, help="in three dimensions")
    parser.set_defaults(scenario=PPO)
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpc-rlhf-storm-")))
        cluster = None if args.here else stack.enter_context(Cluster(folder / "slurm", owner=os.getpid()))
        sky = stack.enter_context(weather(cluster, folder, args.faults, scenario=args.scenario))
        try:
            if not args.scenario.replays:
                began = time.monotonic()
                sky.peace(args.peace)
                print(f"undisturbed: {time.monotonic() - began:.0f} s", file=sys.stderr)
            return 0 if min([report(sky, seed) for seed in args.seed]) else 1
        finally:
            if args.keep:
                for run in folder.glob("*/run"):
                    shutil.copytree(run, args.keep / run.parent.name, dirs_exist_ok=True)


def report(sky: Weather, seed: int) -> bool:
    began = time.monotonic()
    outcome = sky.storm(seed)
    print(f"\nseed {seed}: {time.monotonic() - began:.0f} s\n{outcome.table}")
    print(f"healed by the user: {len(outcome.healed)}", *outcome.healed, sep="\n  ")
    print("not as in peace, or not explained:", *(outcome.differ + outcome.odd or ["nothing"]), sep="\n  ", flush=True)
    return not outcome.differ + outcome.odd


if __name__ == "__main__":
    sys.exit(main())
