"""A run on this machine without Slurm, restarted whenever its launcher has exited."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.chain import Watched
from tests.cluster.cluster import CHECKOUT


@dataclass
class Here(Watched):
    """A run of `hpc-rlhf run`.

    Attributes:
        env: its environment.
        codes: exit codes of its launchers.
    """

    spec: Path
    path: Path
    sets: tuple[str, ...]
    env: Mapping[str, str]
    codes: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Start or resume it."""
        sets = [word for each in (f"run_dir={self.path}", *self.sets) for word in ("--set", each)]
        command = [sys.executable, "-m", "hpc_rlhf.cli", "run", str(self.spec), *sets]
        with (self.path.parent / "launcher.log").open("ab") as log:
            self.launcher = subprocess.Popen(
                command, cwd=CHECKOUT, env={**os.environ, **self.env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )  # fmt: skip
