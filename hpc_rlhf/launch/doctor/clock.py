"""The clock of this machine against the controller's."""

from __future__ import annotations

import re
import time

from hpc_rlhf.launch.doctor import site
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning

_WARNING, _ERROR = 5, 60  # seconds


def skew() -> float:
    """Seconds by which this machine's clock is ahead of the controller's, to within a second.

    Raises:
        HpcRlhfError: the controller does not respond.
    """
    before = time.time()
    header = site.configuration().get("", "")
    after = time.time()
    stamp = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", header)
    if stamp is None:
        return 0.0
    theirs = time.mktime(time.strptime(stamp[0], "%Y-%m-%dT%H:%M:%S"))
    # The controller truncates to seconds, and reads its clock at some time in between.
    ahead, behind = before - (theirs + 1), after - theirs
    return ahead if ahead > 0 else min(behind, 0.0)


def check(seconds: float) -> Finding:
    """Judge a skew.

    Args:
        seconds: by which this machine's clock is ahead.
    """
    if abs(seconds) < _WARNING:
        return ok("clock", "in sync with the controller's")
    message = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the controller's"
    fix = "ask an administrator to sync it with chrony or ntp; logs and Slurm's credentials depend on it"
    return (error if abs(seconds) >= _ERROR else warning)("clock", message, fix)
