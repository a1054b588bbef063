"""Slurm's settings against what a chain of jobs needs to start, to be preempted and to go on."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor import site
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.slurm.durations import seconds, time_limit
from hpc_rlhf.spec.cluster import SlurmSpec

_TESTED = (22, 5)  # the oldest Slurm that the tests run on
_MIN_JOB_AGE = 60  # seconds in which a sentinel has started and asked
_UNUSABLE = ("DOWN", "DRAIN", "FAIL", "MAINT", "NOT_RESPONDING", "POWERED_DOWN", "PLANNED_DOWN")
_CLOCK_WARNING, _CLOCK_ERROR = 5, 60


def check_settings() -> list[Finding]:
    """The cluster as a whole."""
    config = site.configuration()
    findings = [_version(config), *_clock(config.get("", "")), _accounting(config), _job_age(config)]
    if "kill_invalid_depend" in config.get("DependencyParameters", ""):
        said = "kill_invalid_depend: Slurm cancels the stages after one that ended badly; healing submits them again"
        findings.append(ok("dependencies", said))
    return findings


def check_stages(plan: Plan, templates: Templates) -> list[Finding]:
    """Each stage's settings against its partitions and against sbatch's own judgement; what is the same is said once."""
    known = _Known(site.configuration(), site.partitions(), site.nodes())
    stages: dict[Finding, list[str]] = {}
    for job in plan.jobs:
        for finding in _stage(job, templates.script(plan, job, "true"), known):
            stages.setdefault(finding, []).append(job.stage)
    return [finding.at(", ".join(names)) for finding, names in stages.items()]


def clock_skew() -> float:
    """Seconds by which this machine's clock is ahead of the controller's; known to a second.

    Raises:
        HpcRlhfError: the controller gives no answer.
    """
    before = time.time()
    said = site.configuration().get("", "")
    after = time.time()
    theirs = _as_of(said)
    if theirs is None:
        return 0.0
    # The controller cuts the second off, and answers at some time in between.
    ahead, behind = before - (theirs + 1), after - theirs
    return ahead if ahead > 0 else min(behind, 0.0)


def judge_skew(skew: float) -> Finding:
    """What to say of a clock that is so many seconds ahead of the controller's."""
    if abs(skew) < _CLOCK_WARNING:
        return ok("clock", "agrees with the controller's")
    said = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the controller's"
    cure = "have an administrator let chrony or ntp set it; logs and Slurm's credentials go by it"
    return (error if abs(skew) >= _CLOCK_ERROR else warning)("clock", said, cure)


def _clock(as_of: str) -> list[Finding]:
    return [judge_skew(clock_skew())] if as_of else []


def _as_of(text: str) -> float | None:
    found = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", text)
    return time.mktime(time.strptime(found[0], "%Y-%m-%dT%H:%M:%S")) if found else None


def _version(config: Mapping[str, str]) -> Finding:
    version = config.get("SLURM_VERSION", "")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < _TESTED:
        return warning(
            "slurm", f"version {version} is older than any tested", "try a small run first: jobs/tiny.yaml"
        )
    return ok("slurm", f"version {version}")


def _accounting(config: Mapping[str, str]) -> Finding:
    kind = config.get("AccountingStorageType", "")
    cure = (
        "nothing, if `hpc-rlhf status` is asked while Slurm still knows a job (MinJobAge); "
        "otherwise have an administrator set up slurmdbd"
    )
    if not kind or kind.endswith("/none"):
        said = "this cluster keeps no accounts: how a job ended is soon forgotten where its log does not say"
        return warning("accounting", said, cure)
    problem = site.accounting_problem()
    if problem:
        return warning("accounting", f"the accounts cannot be read: {problem}", cure)
    return ok("accounting", f"kept ({kind.rpartition('/')[2]})")


def _job_age(config: Mapping[str, str]) -> Finding:
    said = config.get("MinJobAge", "")
    seconds = int(re.match(r"\d*", said)[0] or 300)  # type: ignore[index]
    if 0 < seconds < _MIN_JOB_AGE:
        return warning(
            "job age",
            f"MinJobAge is {seconds} s: a job that ended is forgotten before it can be requeued, and is submitted anew",
            "have an administrator set MinJobAge to 300, Slurm's default",
        )
    return ok("job age", f"Slurm knows a job for {seconds} s after its end")


@dataclass(frozen=True)
class _Known:
    """What the controller says."""

    config: Mapping[str, str]
    partitions: Mapping[str, Mapping[str, str]]
    nodes: Sequence[Mapping[str, str]]


def _stage(job: PlannedJob, script: str, known: _Known) -> Iterator[Finding]:
    partitions = known.partitions
    yield _requeue(script, known.config)
    default = [name for name, facts in partitions.items() if facts.get("Default") == "YES"]
    names = job.slurm.partition.split(",") if job.slurm.partition else default
    if not names:
        yield error(
            "partition",
            "the cluster has no default partition, and the spec names none",
            f"set slurm.partition to one of: {', '.join(partitions)}",
        )
    fine = bool(names)
    for name in names:
        if name not in partitions:
            fine = False
            yield error(
                "partition",
                f"there is no partition {name}",
                f"set slurm.partition to one of: {', '.join(partitions)}",
            )
            continue
        limits = list(_limits(name, known, job.slurm))
        fine = fine and not any(each.level == "error" for each in limits)
        yield from limits
        yield _preemption(name, partitions[name], known.config)
    if fine:
        yield _test(script)


def _requeue(script: str, config: Mapping[str, str]) -> Finding:
    asked = re.search("^#SBATCH +--requeue", script, re.MULTILINE)
    cure = "keep `#SBATCH --requeue` in your template, or have an administrator set JobRequeue=1"
    if re.search("^#SBATCH +--no-requeue", script, re.MULTILINE):
        return error(
            "requeue", "the job's script forbids it to be requeued: the first preemption ends the chain", cure
        )
    if config.get("JobRequeue") != "0":
        return ok("requeue", "allowed")
    if asked:
        return warning(
            "requeue",
            "JobRequeue=0: the cluster requeues only jobs that ask for it. Ours do, which a submit plugin may take away",
            "hpc-rlhf doctor --on-cluster tells whether a job keeps its --requeue; or have an administrator set JobRequeue=1",
        )
    return error(
        "requeue",
        "JobRequeue=0, and the job's script does not ask: the first preemption ends the chain",
        cure,
    )


def _limits(name: str, known: _Known, wanted: SlurmSpec) -> Iterator[Finding]:
    facts = known.partitions[name]
    if facts.get("State", "UP") != "UP":
        yield error("partition", f"{name} is {facts['State']}", "choose another, or ask when it is UP again")
    limit, time_asked = seconds(facts.get("MaxTime", "UNLIMITED")), time_limit(wanted.time)
    if (math.inf if time_asked is None else time_asked) > limit:
        yield error(
            "time limit",
            f"{name} allows {facts['MaxTime']}, the stage asks for {wanted.time}",
            f"set slurm.time to at most {facts['MaxTime']}; a stage that needs longer saves, requeues and goes on",
        )
    most = facts.get("MaxNodes", "UNLIMITED")
    if most.isdigit() and int(most) < wanted.nodes:
        yield error(
            "nodes", f"{name} allows {most} nodes, the stage asks for {wanted.nodes}", "set fewer slurm.nodes"
        )
    nodes = [node for node in known.nodes if name in node.get("Partitions", "").split(",")]
    having = [node for node in nodes if _gpus(node) >= wanted.gpus_per_node]
    up = [node for node in having if not any(word in node.get("State", "") for word in _UNUSABLE)]
    per_node = f"{wanted.gpus_per_node} GPU{'s' * (wanted.gpus_per_node > 1)}"
    if len(having) < wanted.nodes:
        counts = sorted({_gpus(node) for node in nodes}, reverse=True)
        yield error(
            "nodes",
            f"{name} has {len(having)} nodes with {per_node}, the stage asks for {wanted.nodes}",
            f"set slurm.nodes and slurm.gpus_per_node to what is there: {len(nodes)} nodes, GPUs {counts or 'none'}",
        )
    elif len(up) < wanted.nodes:
        yield warning(
            "nodes",
            f"only {len(up)} of the {len(having)} fitting nodes of {name} are up, the stage asks for {wanted.nodes}",
            "it will wait for them; why: sinfo -R",
        )
    else:
        yield ok(
            "partition", f"{name}: {len(up)} fitting nodes are up, time limit {facts.get('MaxTime', '')}"
        )


def _gpus(node: Mapping[str, str]) -> int:
    """GPUs of a node, in its Gres such as gpu:a100:8(S:0-1)."""
    found = re.findall(r"gpu(?::[^:,()]+)?:(\d+)(?=[(,]|$)", node.get("Gres", ""))
    return sum(map(int, found))


def _preemption(name: str, facts: Mapping[str, str], config: Mapping[str, str]) -> Finding:
    mode = facts.get("PreemptMode", "OFF")
    if mode == "OFF" or config.get("PreemptType", "preempt/none").endswith("/none"):
        return ok("preemption", f"{name}: none")
    grace = int(facts.get("GraceTime", "0") or 0)
    if "SUSPEND" in mode or "GANG" in mode:
        return warning(
            "preemption",
            f"{name}: jobs are suspended ({mode}), and ranks that stand still may time out",
            "have an administrator set PreemptMode=REQUEUE for this partition, or choose another",
        )
    if not grace:
        return warning(
            "preemption",
            f"{name}: {mode} without a grace: the work since the last checkpoint is done again",
            "checkpoint often (checkpoint_every: auto, with mttf), or have an administrator set GraceTime=300",
        )
    return ok("preemption", f"{name}: {mode}, {grace} s of grace to save in")


def _test(script: str) -> Finding:
    """What sbatch itself says: accounts, QOS, memory and all that only it knows."""
    with TemporaryDirectory(prefix="hpc-rlhf-") as folder:
        path = Path(folder, "script")
        path.write_text(script, encoding="utf-8")
        try:
            site.test(path)
        except HpcRlhfError as problem:
            said = problem.message.partition(": ")[2].replace("allocation failure: ", "")
            return error(
                "submission", f"sbatch would refuse the job: {said}", "change the slurm settings of the stage"
            )
    return ok("submission", "sbatch would take the job")


def unfit(findings: Sequence[Finding]) -> bool:
    """Whether no job can be submitted as the spec asks."""
    named = ("partition", "time limit", "nodes", "submission")
    return any(finding.level == "error" and finding.check in named for finding in findings)
