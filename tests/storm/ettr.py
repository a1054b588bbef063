"""``python -m tests.storm.ettr``: the ETTR of a chain that is preempted again and again.

The ideal loses no step and saves in no time, but each attempt has to start: productive / (productive + attempts x the
time that the stage's first attempt took to its first step). ETTR as in arXiv 2410.21680.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster import Cluster
from tests.storm.run import weather
from tests.storm.strikes import FAULTS, preempt
from tests.storm.verdict import table, unexplained


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm.ettr", description=__doc__)
    parser.add_argument("--faults", type=int, default=15, help="preemptions; a third of them strikes each stage")
    parser.add_argument("--every", type=float, default=120, help="seconds of an attempt before it is preempted")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="hpc-rlhf-ettr-") as folder,
        Cluster(Path(folder) / "slurm", owner=os.getpid()) as cluster,
        weather(cluster, Path(folder), args.faults, args.every) as sky,
    ):
        storm = sky.rage(1, [fault for fault in FAULTS if fault.strike is preempt])
        command = [sys.executable, "-m", "hpc_rlhf.cli", "status", str(storm.chain.path), "--json"]
        facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(table(storm), *(unexplained(storm) or ["every interruption has the right reason"]), sep="\n")
    useful = ideal = actual = 0.0
    for stage in facts["stages"]:
        spent = stage["goodput"]
        attempts = len(spent["interruptions"]) + 1
        first = spent["starting"] - sum(each["starting"] or 0 for each in spent["interruptions"])
        useful += spent["productive"]
        ideal += spent["productive"] + attempts * first
        actual += sum(spent[name] for name in ("productive", "starting", "lost", "saving"))
        print(
            stage["stage"],
            {name: spent[name] for name in spent if name != "interruptions"},
            f"first start {first:.1f} s",
        )
    print(f"ETTR {useful / actual:.3f}, ideal {useful / ideal:.3f}, share of the ideal {ideal / actual:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
