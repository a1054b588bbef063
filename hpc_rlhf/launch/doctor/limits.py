"""Checks whether a run may queue as many jobs as it wants to, by the limits of its associations and QOS."""

from __future__ import annotations

import getpass
from collections.abc import Mapping

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor import site
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.launch.plan import Plan
from hpc_rlhf.slurm import commands

_LEAST = 2  # a stage and its sentinel, which submits the next ones


def check(plan: Plan) -> list[Finding]:
    """Compare the number of a run's jobs with the limits on submitted jobs. Empty where Slurm enforces none."""
    if "limits" not in site.configuration().get("AccountingStorageEnforce", ""):
        return []
    try:
        limits = _limits(plan)
    except HpcRlhfError as problem:
        return [warning("jobs", f"the limits on jobs are unknown: {problem.message}", "see sacctmgr show qos")]
    sentinels = sum(job.slurm.heal.enabled for job in plan.jobs)
    queued = f"a run queues {len(plan.jobs) + sentinels} jobs, {sentinels} of them sentinels"
    least, what = min(((limit, what) for what, limit in limits.items()), default=(None, ""))
    if least is None or least >= len(plan.jobs) + sentinels:
        return [ok("jobs", queued)]
    message = f"{queued}; {what} allows {least}"
    if least < _LEAST or not sentinels:
        fix = f"enable slurm.heal, and use an account and a QOS that allow {_LEAST} jobs or more"
        return [error("jobs", message, fix)]
    return [ok("jobs", f"{message}: later stages are submitted when earlier ones have ended")]


def _limits(plan: Plan) -> dict[str, int]:
    """The limits on submitted jobs that apply, each by what sets it."""
    settings = [job.slurm for job in plan.jobs]
    accounts = {each.account for each in settings}
    names = {each.qos for each in settings if each.qos}
    limits: dict[str, str] = {}
    for row in _table("assoc", "Account,DefaultQOS,MaxSubmitJobs,GrpSubmitJobs", f"user={getpass.getuser()}"):
        if accounts == {None} or row["Account"] in accounts:
            limits |= {f"account {row['Account']} ({name})": row[name] for name in ("MaxSubmitJobs", "GrpSubmitJobs")}
            names.add(row["DefaultQOS"] or "normal")
    used = {name for each in settings for name in (each.partition or "").split(",")}
    for name, facts in site.partitions().items():
        if name in used or (facts.get("Default") == "YES" and "" in used):
            names.add(facts.get("QoS", ""))
    for row in _table("qos", "Name,MaxSubmitJobsPerUser,GrpSubmitJobs"):
        if row["Name"] in names:
            limits |= {f"QOS {row['Name']} ({name})": row[name] for name in ("MaxSubmitJobsPerUser", "GrpSubmitJobs")}
    return {what: int(limit) for what, limit in limits.items() if limit.isdigit()}


def _table(kind: str, columns: str, *where: str) -> list[Mapping[str, str]]:
    """What sacctmgr shows of a kind, a mapping for each row."""
    options = ["--noheader", "--parsable2", "show", kind, *where, f"format={columns}"]
    lines = commands.run(["sacctmgr", *options]).splitlines()
    return [dict(zip(columns.split(","), line.split("|"), strict=True)) for line in lines if line]
