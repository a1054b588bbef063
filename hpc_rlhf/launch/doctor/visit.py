"""Checks the nodes that stages would run on, in a short job that runs ``probe`` on each."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor.cluster import without_requeue
from hpc_rlhf.launch.doctor.finding import Finding, error, ok, warning
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.launch.render import Templates, rank_python
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import JobRecord
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec

_UNSHARED = 77  # the job's exit code where its first node does not see the folder
_NODES = 2  # enough to compare, and few enough to be allocated soon
_COMMENT = "hpc-rlhf doctor"
_MINUTES = 5  # the time limit; it takes one, unless Python loads from a cold disk
_POLL = 2.0
_UNSEEN = 60.0
# Settings that change neither the nodes that a stage runs on nor what it finds there.
_ALIKE = {"time", "signal_seconds", "max_requeues", "heal", "comment", "mail_type", "mail_user", "nodes"}

Say = Callable[[str], None]


def visit(spec: JobSpec, plan: Plan, templates: Templates, folder: Path, ops: Sequence[str], say: Say) -> list[Finding]:
    """Submit a job for each kind of node that the stages run on, wait, and collect the findings.

    Args:
        folder: a folder in the run directory for these jobs.
        ops: DeepSpeed ops that the stages need.
        say: called with progress messages.
    """
    kinds: dict[str, list[PlannedJob]] = {}
    for job in plan.jobs:
        settings = job.slurm.model_dump_json(exclude=_ALIKE) + str(min(job.slurm.nodes, _NODES))
        kinds.setdefault(settings, []).append(job)
    submitted: dict[str, tuple[list[PlannedJob], Path]] = {}  # stages and folder, by job id
    findings: list[Finding] = []
    try:
        for alike in kinds.values():
            stages, own = ", ".join(job.stage for job in alike), folder / alike[0].stage
            try:
                job_id = _send(spec, plan, templates, alike, own, ops)
            except HpcRlhfError as problem:
                message = f"the job was rejected: {problem.message.partition(': ')[2]}"
                findings.append(error("submission", message, "change the stage's slurm settings").at(stages))
                continue
            submitted[job_id] = (alike, own)
        _wait(submitted, say)
    except BaseException:  # the user does not want to wait any longer
        commands.cancel(list(submitted))
        raise
    for job_id, (alike, own) in submitted.items():
        findings += _gather(job_id, alike, own)
    return findings


def _send(
    spec: JobSpec, plan: Plan, templates: Templates, alike: Sequence[PlannedJob], folder: Path, ops: Sequence[str]
) -> str:
    """Submit the job for one kind of node, and return its id."""
    job = alike[0]
    folder.mkdir(mode=0o700)
    (folder / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    limits = {"nodes": min(job.slurm.nodes, _NODES), "time": str(_MINUTES), "signal_seconds": 30}
    small = replace(job, slurm=job.slurm.model_copy(update=limits), job_name=f"{spec.name}.doctor")
    words = [str(folder), ",".join(each.stage for each in alike), *ops]
    command = f"{rank_python(job)} hpc_rlhf.launch.doctor.probe {shlex.join(words)}"
    script = folder / "script"
    script.write_text(templates.doctor(plan, small, folder, command, _UNSHARED), encoding="utf-8")
    # A job whose log cannot be opened fails silently.
    return commands.submit(script, ["--output=/dev/null", f"--comment={_COMMENT}"])


def _wait(job_ids: Iterable[str], say: Say) -> None:
    """Wait until all jobs have ended, and report what they wait for whenever that changes."""
    remaining, last = set(job_ids), ""
    while remaining:
        queue = commands.queue()
        live = [queue[job_id] for job_id in remaining if job_id in queue and queue[job_id].live]
        remaining = {job.job_id for job in live}
        states = [f"job {job.job_id} {job.state.lower()}{f' ({job.reason})' if job.reason else ''}" for job in live]
        now = ", ".join(sorted(states))
        if now and now != last:
            say(f"waiting for {now}; Ctrl-C cancels it")
            last = now
        if remaining:
            time.sleep(_POLL)


def _gather(job_id: str, alike: Sequence[PlannedJob], folder: Path) -> list[Finding]:
    """The findings of a job's nodes. Equal findings of several nodes are merged."""
    past, stages = commands.find_record(job_id), ", ".join(job.stage for job in alike)
    nodes = commands.hostnames(past.nodes) if past is not None and past.nodes else []
    # A network file system may show a file some time after another node wrote it.
    deadline = time.monotonic() + (_UNSEEN if past is not None and past.state == "COMPLETED" else 0)
    while len(files := sorted(folder.glob("*.json"))) < len(nodes) and time.monotonic() < deadline:
        time.sleep(_POLL)
    responded = [file.stem for file in files]
    nodes_by_finding: dict[Finding, list[str]] = {}
    for file in files:
        for fields in json.loads(file.read_text(encoding="utf-8")):
            nodes_by_finding.setdefault(Finding(**fields), []).append(file.stem)
    findings = [finding.at(",".join(names)) for finding, names in nodes_by_finding.items()]
    # Only the controller, whose records count restarts, knows whether the job can be requeued; accounting does not.
    if past is not None and past.restarts is not None and not past.requeueable:
        message = f"job {job_id} was submitted with --requeue but cannot be requeued: {without_requeue(alike)}"
        level = warning if all(job.slurm.heal.enabled for job in alike) else error
        fix = "set slurm.heal.enabled: true, or ask an administrator which submit plugin removes --requeue"
        findings.append(level("requeue", message, fix).at(stages))
    queued = commands.queue().get(job_id)
    if queued is not None and queued.comment != _COMMENT:
        message = f"a submit plugin replaces the comment of jobs by {queued.comment!r}: they are found by their scripts"
        fix = "while jobs of the run are queued or running, leave its folder where it is"
        findings.append(warning("comment", message, fix).at(stages))
    silent = [node for node in nodes if node not in responded]
    if silent or not responded:
        findings.append(_silent(past, folder).at(",".join(silent) or stages))
    elif len(responded) > 1:
        findings.append(ok("shared", "all nodes write to the same run directory").at(",".join(responded)))
    else:
        findings.append(ok("shared", "the node writes to the same run directory as this machine").at(responded[0]))
    return findings


def _silent(past: JobRecord | None, folder: Path) -> Finding:
    """The finding for nodes that left no result."""
    log = folder / "log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    code = past.exit_code.partition(":")[0] if past is not None else ""
    if code == str(_UNSHARED) or any("No such file or directory" in line and str(folder) in line for line in lines):
        message = f"{folder.parents[1]} does not exist there: the run directory is not shared"
        fix = "set run_dir to a folder on a file system that login and compute nodes share (see df -T)"
        return error("shared", message, fix)
    state = past.state if past is not None else "forgotten by Slurm"
    message = f"the job ended {state} without a result{f': {lines[-1]}' if lines else ''}"
    return error("nodes", message, "check with srun that slurm.setup and this Python work on the nodes")
