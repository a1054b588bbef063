"""Checks Slurm's settings: whether a chain of jobs can start, be preempted and continue."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor import site
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import seconds, time_limit
from hpc_rlhf.spec.cluster import SlurmSpec

_TESTED = (22, 5)  # the oldest Slurm that the tests run on
_MIN_JOB_AGE = 60  # seconds in which a sentinel starts and asks for its stage's job
_WORDS = {"submission": "job", "sentinel": "sentinel"}
_LEAST_MB = 1024  # of a rank, before any model: Python, torch and DeepSpeed
_SENTINEL_MB = 200
_UNUSABLE = ("DOWN", "DRAIN", "FAIL", "MAINT", "NOT_RESPONDING", "POWERED_DOWN", "PLANNED_DOWN")


def check_settings() -> list[Finding]:
    """Check the settings of the whole cluster."""
    config = site.configuration()
    findings = [_version(config), site.check_clock(), _accounting(config), _job_age(config)]
    if "kill_invalid_depend" in config.get("DependencyParameters", ""):
        message = "kill_invalid_depend: Slurm cancels the stages after a failed one; healing submits them again"
        findings.append(ok("dependencies", message))
    if "enable_expedited_requeue" in config.get("SlurmctldParameters", ""):
        findings.append(ok("expedited requeue", "slurm.expedite: true lets a stage start again soon after a lost node"))
    return [finding.at("slurm") for finding in findings]


def check_stages(plan: Plan, templates: Templates) -> list[Finding]:
    """Check each stage's settings against its partitions and with sbatch. Equal findings are merged."""
    known = _Known(site.configuration(), site.partitions(), site.nodes())
    stages: dict[Finding, list[str]] = {}
    for job in plan.jobs:
        findings = [*_stage(job, templates.script(plan, job, "true"), known)]
        if job.slurm.heal.enabled and not unfit(findings):
            fix = "set slurm.heal to what the site requires of such a job"
            findings.append(_test(templates.sentinel(plan, job), "sentinel", fix))
        for finding in findings:
            stages.setdefault(finding, []).append(job.stage)
    return [finding.at(", ".join(names)) for finding, names in stages.items()]


def _version(config: Mapping[str, str]) -> Finding:
    version = config.get("SLURM_VERSION", "")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < _TESTED:
        message = f"version {version} is older than any that is tested"
        return warning("slurm", message, "try a small run first: jobs/tiny.yaml")
    return ok("slurm", f"version {version}")


def _accounting(config: Mapping[str, str]) -> Finding:
    kind = config.get("AccountingStorageType", "")
    fix = "run hpc-rlhf status soon after a job ends (MinJobAge), or ask an administrator for slurmdbd"
    if kind in ("", "(null)") or kind.endswith("/none"):
        return warning("accounting", "off: Slurm soon forgets how a job ended, unless its log shows it", fix)
    try:
        commands.run(["sacct", "--noheader", "--jobs=1"])
    except HpcRlhfError as problem:
        return warning("accounting", f"sacct fails: {problem.message}", fix)
    return ok("accounting", f"on ({kind.rpartition('/')[2]})")


def _job_age(config: Mapping[str, str]) -> Finding:
    setting = config.get("MinJobAge", "")
    seconds = int(re.match(r"\d*", setting)[0] or 300)  # type: ignore[index]
    if 0 < seconds < _MIN_JOB_AGE:
        problem = "Slurm forgets a finished job before it can be requeued, so it is submitted again"
        fix = "ask an administrator to set MinJobAge to 300, Slurm's default"
        return warning("job age", f"MinJobAge is {seconds} s: {problem}", fix)
    return ok("job age", f"Slurm remembers a job for {seconds} s after its end")


@dataclass(frozen=True)
class _Known:
    """What the controller reports."""

    config: Mapping[str, str]
    partitions: Mapping[str, Mapping[str, str]]
    nodes: Sequence[Mapping[str, str]]


def _stage(job: PlannedJob, script: str, known: _Known) -> Iterator[Finding]:
    partitions = known.partitions
    yield _requeue(job, script, known.config)
    default = [name for name, facts in partitions.items() if facts.get("Default") == "YES"]
    names = job.slurm.partition.split(",") if job.slurm.partition else default
    choose = f"set slurm.partition to one of: {', '.join(partitions)}"
    if not names:
        yield error("partition", "the spec names no partition, and the cluster has no default", choose)
    usable = bool(names)
    for name in names:
        if name not in partitions:
            usable = False
            yield error("partition", f"the cluster has no partition {name}", choose)
            continue
        limits = list(_limits(name, known, job))
        usable = usable and not any(each.level == "error" for each in limits)
        yield from limits
        yield from _memory(name, known, job.slurm)
        yield _preemption(name, partitions[name], known.config)
    if usable:
        yield _test(script, "submission", "change the stage's slurm settings")


def without_requeue(jobs: Sequence[PlannedJob]) -> str:
    """The effect of an interruption on stages whose jobs Slurm does not requeue."""
    if all(job.slurm.heal.enabled for job in jobs):
        return "the sentinel of an interrupted stage submits it again, under another job id"
    return "the first interruption would end the chain"


def _requeue(job: PlannedJob, script: str, config: Mapping[str, str]) -> Finding:
    fix = "keep `#SBATCH --requeue` in your template, or ask an administrator to set JobRequeue=1"
    ends = without_requeue([job])
    if re.search("^#SBATCH +--no-requeue", script, re.MULTILINE):
        return error("requeue", f"the script has --no-requeue: {ends}", fix)
    if config.get("JobRequeue") != "0":
        return ok("requeue", "allowed")
    if not re.search("^#SBATCH +--requeue", script, re.MULTILINE):
        return error("requeue", f"JobRequeue=0, and the script has no --requeue: {ends}", fix)
    return warning(
        "requeue",
        "JobRequeue=0: only jobs with --requeue are requeued. Ours have it, but a submit plugin may remove it",
        "check that jobs keep it with hpc-rlhf doctor --on-cluster, or ask an administrator to set JobRequeue=1",
    )


def _limits(name: str, known: _Known, job: PlannedJob) -> Iterator[Finding]:
    settings = job.slurm
    facts = known.partitions[name]
    if facts.get("State", "UP") != "UP":
        yield error("partition", f"{name} is {facts['State']}", "choose another, or wait until it is UP")
    limit, requested = seconds(facts.get("MaxTime", "UNLIMITED")), time_limit(settings.time)
    if (math.inf if requested is None else requested) > limit:
        fix = f"set slurm.time to at most {facts['MaxTime']}; a longer stage saves, requeues itself and resumes"
        yield error("time limit", f"{name} allows {facts['MaxTime']}, the stage requests {settings.time}", fix)
    most = facts.get("MaxNodes", "UNLIMITED")
    if most.isdigit() and int(most) < job.nodes:
        yield error("nodes", f"{name} allows {most} nodes, the stage requests {job.nodes}", "lower slurm.nodes")
    nodes = [node for node in known.nodes if name in node.get("Partitions", "").split(",")]
    suitable = [node for node in nodes if _gpus(node) >= settings.gpus_per_node]
    up = [node for node in suitable if not any(word in node.get("State", "") for word in _UNUSABLE)]
    requests = f"the stage requests {job.nodes}"
    if len(suitable) < job.nodes:
        per_node = f"{settings.gpus_per_node} GPU{'s' * (settings.gpus_per_node > 1)}"
        counts = sorted({_gpus(node) for node in nodes}, reverse=True)
        has = f"{len(nodes)} nodes, GPUs per node {counts or 'none'}"
        fix = f"set slurm.nodes and slurm.gpus_per_node to what it has: {has}"
        yield error("nodes", f"{name} has {len(suitable)} nodes with {per_node}, {requests}", fix)
    elif len(up) < job.nodes:
        few = f"only {len(up)} of the {len(suitable)} suitable nodes of {name} are up"
        yield warning("nodes", f"{few}, {requests}", "the job will wait for them; see why with sinfo -R")
    else:
        yield ok("partition", f"{name}: {len(up)} suitable nodes are up, time limit {facts.get('MaxTime', '')}")


def _memory(name: str, known: _Known, settings: SlurmSpec) -> Iterator[Finding]:
    """Warn of a partition's default memory, which jobs get without a word, where it is too little."""
    facts, cpus = known.partitions[name], (settings.cpus_per_gpu or 1) * settings.tasks_per_node
    defaults = {key: facts.get(key, known.config.get(key, "")) for key in ("DefMemPerCPU", "DefMemPerNode")}
    per_cpu, per_node = (int(value) if value.isdigit() else 0 for value in defaults.values())
    least = _LEAST_MB * settings.tasks_per_node
    given = per_node or per_cpu * cpus
    if settings.mem is None and not settings.extra.keys() & {"mem-per-cpu", "mem-per-gpu"} and 0 < given < least:
        message = (
            f"{name} gives a job {given} MB per node by default; its {settings.tasks_per_node} ranks need at least"
        )
        yield warning("memory", f"{message} {least} MB", "set slurm.mem, such as 64G, or 0 for all of a node's")
    heal, given = settings.heal, per_node or per_cpu
    if heal.enabled and heal.partition in (None, name) and heal.mem is None and 0 < given < _SENTINEL_MB:
        message = f"{name} gives the sentinel {given} MB by default; it needs {_SENTINEL_MB} MB"
        yield warning("memory", message, f"set slurm.heal.mem: {_SENTINEL_MB}M")


def _gpus(node: Mapping[str, str]) -> int:
    """GPUs of a node, in its Gres such as gpu:a100:8(S:0-1)."""
    counts = re.findall(r"gpu(?::[^:,()]+)?:(\d+)(?=[(,]|$)", node.get("Gres", ""))
    return sum(map(int, counts))


def _preemption(name: str, facts: Mapping[str, str], config: Mapping[str, str]) -> Finding:
    mode = facts.get("PreemptMode", "OFF")
    if mode == "OFF" or config.get("PreemptType", "preempt/none").endswith("/none"):
        return ok("preemption", f"{name}: none")
    grace = int(facts.get("GraceTime", "0") or 0)
    if "SUSPEND" in mode or "GANG" in mode:
        message = f"{name}: preempted jobs are suspended ({mode}), and suspended ranks may time out"
        fix = "ask an administrator to set PreemptMode=REQUEUE for this partition, or choose another"
        return warning("preemption", message, fix)
    if not grace:
        message = f"{name}: {mode} without grace time: work since the last checkpoint is lost"
        fix = "checkpoint often (checkpoint_every: auto, with mttf), or ask an administrator to set GraceTime=300"
        return warning("preemption", message, fix)
    return ok("preemption", f"{name}: {mode}, with {grace} s of grace time to save")


def _test(script: str, check: str, fix: str) -> Finding:
    """Let sbatch check a script: accounts, QOS, memory and what else only Slurm knows."""
    with TemporaryDirectory(prefix="hpc-rlhf-") as folder:
        path = Path(folder, "script")
        path.write_text(script, encoding="utf-8")
        try:
            commands.try_out(path)
        except HpcRlhfError as problem:
            reason = problem.message.partition(": ")[2].replace("allocation failure: ", "")
            return error(check, f"sbatch would reject the {_WORDS[check]}: {reason}", fix)
    return ok(check, f"sbatch would accept the {_WORDS[check]}")


def unfit(findings: Sequence[Finding]) -> bool:
    """Whether Slurm would reject the jobs of the spec."""
    named = ("partition", "time limit", "nodes", "submission")
    return any(finding.level == "error" and finding.check in named for finding in findings)
