"""When Slurm thinks that a run would start, were it submitted now."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import Plan
from hpc_rlhf.slurm import commands

# Seconds that Slurm may take to answer.
SOON = 5


def predicted_starts(plan: Plan, beside: Path | None = None) -> dict[str, str]:
    """The time at which each stage that waits for no other would start, or why Slurm does not say; empty without Slurm.

    Args:
        plan: the jobs.
        beside: folder of the job file; templates in its ``templates/`` win over ours.

    Raises:
        HpcRlhfError: a template does not render.
    """
    found: dict[str, str] = {}
    if shutil.which("sbatch") is None:
        return found
    from hpc_rlhf.launch.render import Templates

    templates = Templates(beside)
    with TemporaryDirectory(prefix="hpc-rlhf-") as folder:
        path = Path(folder, "script")
        for job in plan.jobs:
            if job.needs:
                continue
            path.write_text(templates.script(plan, job, "true"), encoding="utf-8")
            try:
                start = predicted_start(path)
            except HpcRlhfError as error:
                found[job.stage] = f"no start is predicted: {error.message.splitlines()[-1]}"
                break  # what Slurm has against one stage it mostly has against all
            found[job.stage] = f"would start {start or 'at a time that Slurm does not tell'}"
    return found


def predicted_start(script: Path) -> str | None:
    """When Slurm thinks that a script would start if it were submitted now, such as 2026-05-01T09:30:00 by the
    controller's clock; None where it does not say. It submits nothing.

    Raises:
        HpcRlhfError: it would be refused, or Slurm does not answer soon.
    """
    said = commands.execute(["sbatch", "--test-only", str(script)], SOON).stderr
    found = re.search(r"to start at (\d[\dT:-]+)", said)
    return found[1] if found else None
