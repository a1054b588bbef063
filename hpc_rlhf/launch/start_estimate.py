"""When Slurm expects a run to start, if it were submitted now."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import Plan
from hpc_rlhf.slurm import commands

# Seconds that Slurm may take to respond.
SOON = 5


def predicted_starts(plan: Plan, beside: Path | None = None) -> dict[str, str]:
    """When each stage that needs no other would start, or why Slurm gives no time; empty without Slurm.

    Args:
        plan: the jobs.
        beside: folder of the job file; templates in its ``templates/`` win over ours.

    Raises:
        HpcRlhfError: a template does not render.
    """
    starts: dict[str, str] = {}
    if shutil.which("sbatch") is None:
        return starts
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
                starts[job.stage] = f"no start time ({error.message.splitlines()[-1]})"
                break  # the reason mostly holds for all stages
            starts[job.stage] = f"would start at {start}" if start else "no start time (Slurm gives none)"
    return starts


def predicted_start(script: Path) -> str | None:
    """When Slurm would start a script submitted now, such as 2026-05-01T09:30:00 by the controller's clock;
    None if it gives no time. Submits nothing.

    Raises:
        HpcRlhfError: it would be rejected, or Slurm does not respond soon.
    """
    output = commands.execute(["sbatch", "--test-only", str(script)], SOON).stderr
    start = re.search(r"to start at (\d[\dT:-]+)", output)
    return start[1] if start else None
