"""What Slurm's controller reports: its settings, partitions and nodes, and its clock.

Every function raises HpcRlhfError if the controller does not respond.
"""

from __future__ import annotations

import re
import time

from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.slurm import commands

_WARNING_SKEW, _ERROR_SKEW = 5, 60  # seconds


def configuration() -> dict[str, str]:
    """The cluster's settings; under "" the first line, which has the time of the controller's clock."""
    lines = commands.run(["scontrol", "show", "config"]).splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {"": lines[0] if lines else "", **{name.strip(): value.strip() for name, _, value in pairs}}


def partitions() -> dict[str, dict[str, str]]:
    """The fields of ``scontrol show partition``, by partition."""
    return {record["PartitionName"]: record for record in _records("partition") if "PartitionName" in record}


def nodes() -> list[dict[str, str]]:
    """The fields of ``scontrol show node``, for each node."""
    return _records("node")


def _records(kind: str) -> list[dict[str, str]]:
    """Lines of NAME=VALUE words, each as a mapping; the first of repeated names counts."""
    records = []
    for line in commands.run(["scontrol", "--oneliner", "show", kind]).splitlines():
        fields: dict[str, str] = {}
        for word in line.split():
            name, equals, value = word.partition("=")
            if equals:
                fields.setdefault(name, value)
        records.append(fields)
    return records


def clock_skew() -> float:
    """Seconds by which this machine's clock is ahead of the controller's, to within a second."""
    before = time.time()
    header = configuration()[""]
    after = time.time()
    stamp = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", header)
    if stamp is None:
        return 0.0
    theirs = time.mktime(time.strptime(stamp[0], "%Y-%m-%dT%H:%M:%S"))
    # The controller truncates to seconds, and reads its clock at some time in between.
    ahead, behind = before - (theirs + 1), after - theirs
    return ahead if ahead > 0 else min(behind, 0.0)


def check_clock() -> Finding:
    """Compare this machine's clock with the controller's."""
    skew = clock_skew()
    if abs(skew) < _WARNING_SKEW:
        return ok("clock", "in sync with the controller's")
    message = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the controller's"
    fix = "ask an administrator to sync it with chrony or ntp; logs and Slurm's credentials depend on it"
    return (error if abs(skew) >= _ERROR_SKEW else warning)("clock", message, fix)
