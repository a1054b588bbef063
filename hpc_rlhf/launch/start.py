"""When Slurm thinks that a run would start, were it submitted now."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hpc_rlhf import slurm
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.plan import Plan


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
                start = slurm.predicted_start(path)
            except HpcRlhfError as error:
                found[job.stage] = f"no start is predicted: {error.message.splitlines()[-1]}"
                break  # what Slurm has against one stage it mostly has against all
            found[job.stage] = f"would start {start or 'at a time that Slurm does not tell'}"
    return found
