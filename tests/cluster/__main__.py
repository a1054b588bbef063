"""``python -m tests.cluster up DIR | down DIR | status DIR``: a throwaway Slurm cluster for manual use."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from tests.cluster.cluster import Cluster, ClusterError, watch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("verb", choices=("up", "down", "status", "watch"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("owner", type=int, nargs="?", help="watch: stop the cluster when this process ends")
    args = parser.parse_args()
    cluster = Cluster(args.folder)
    try:
        if args.verb == "up":
            up(cluster)
        elif args.verb == "down":
            cluster.stop()
        elif args.verb == "watch":
            watch(cluster.folder, args.owner)
        else:
            return status(cluster)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def up(cluster: Cluster) -> None:
    if cluster.daemons():
        print(f"already running: {cluster.folder}", file=sys.stderr)
    else:
        before = time.monotonic()
        cluster.start()
        print(f"four nodes are up after {time.monotonic() - before:.0f} s; to use them:", file=sys.stderr)
    print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")


def status(cluster: Cluster) -> int:
    daemons = cluster.daemons()
    for name, process in daemons.items():
        print(f"{name:<10} {process.pid:>8} {'running' if process.alive else 'gone'}")
    if not daemons or not all(process.alive for process in daemons.values()):
        print(f"no complete cluster in {cluster.folder}", file=sys.stderr)
        return 1
    print(cluster.run("sinfo").stdout, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
