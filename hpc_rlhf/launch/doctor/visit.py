"""A short job on the nodes that stages would run on, in which each node says what it finds (``probe.py``)."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor.finding import Finding, error, ok
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.launch.render import Templates, rank_python
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import JobRecord
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import dump_spec

_UNSHARED = 77  # the job's exit code where its first node does not see the folder
_NODES = 2  # enough to tell whether nodes agree, and few enough to be had soon
_MINUTES = 5  # the limit; it takes one, unless Python loads from a cold disk
_POLL = 2.0
_UNSEEN = 60.0
# What does not change on which nodes a stage runs, or what it finds there.
_ALIKE = {"time", "signal_seconds", "max_requeues", "heal", "comment", "mail_type", "mail_user", "nodes"}

Say = Callable[[str], None]


def visit(
    spec: JobSpec, plan: Plan, templates: Templates, folder: Path, ops: Sequence[str], say: Say
) -> list[Finding]:
    """Submit a job for each kind of nodes that the stages run on, wait for them, and gather what was found.

    Args:
        folder: in the run directory, for these jobs alone.
        ops: DeepSpeed ops that the stages need.
        say: is told what is waited for.
    """
    kinds = list(_kinds(plan.jobs).values())
    sent: dict[str, tuple[list[PlannedJob], Path]] = {}
    findings: list[Finding] = []
    try:
        for alike in kinds:
            own = folder / alike[0].stage
            try:
                job_id = _send(spec, plan, templates, alike[0], own, ops)
            except HpcRlhfError as problem:
                said = f"the job was refused: {problem.message.partition(': ')[2]}"
                refusal = error("submission", said, "change the slurm settings of the stage")
                findings.append(refusal.at(_stages(alike)))
                continue
            sent[job_id] = (alike, own)
        _wait(sent, say)
    except BaseException:  # the person does not want to wait any longer
        commands.cancel(list(sent))
        raise
    for job_id, (alike, own) in sent.items():
        findings += _gather(job_id, alike, own)
    return findings


def _kinds(jobs: Iterable[PlannedJob]) -> dict[str, list[PlannedJob]]:
    """Jobs that run on the same kind of nodes, together."""
    kinds: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        settings = job.slurm.model_dump_json(exclude=_ALIKE) + str(min(job.slurm.nodes, _NODES))
        kinds.setdefault(settings, []).append(job)
    return kinds


def _send(
    spec: JobSpec, plan: Plan, templates: Templates, job: PlannedJob, folder: Path, ops: Sequence[str]
) -> str:
    """Submit the job of one kind of nodes, and return its id."""
    folder.mkdir(mode=0o700)
    (folder / "spec.yaml").write_text(dump_spec(spec), encoding="utf-8")
    limits = {"nodes": min(job.slurm.nodes, _NODES), "time": str(_MINUTES), "signal_seconds": 30}
    small = replace(job, slurm=job.slurm.model_copy(update=limits), job_name=f"{spec.name}.doctor")
    words = [str(folder), job.stage, *ops]
    command = f"{rank_python(job)} -m hpc_rlhf.launch.doctor.probe {shlex.join(words)}"
    script = folder / "script"
    script.write_text(templates.doctor(plan, small, folder, command, _UNSHARED), encoding="utf-8")
    # Where its log cannot be opened a job fails without a word.
    return commands.submit(script, ["--output=/dev/null"])


def _wait(job_ids: Iterable[str], say: Say) -> None:
    """Until all jobs have ended; says what they wait for whenever that changes."""
    left, told = set(job_ids), ""
    while left:
        queue = commands.queue()
        live = {job_id: queue[job_id] for job_id in left if job_id in queue and queue[job_id].live}
        left &= set(live)
        words = [f"job {job.job_id} {job.state.lower()}{f' ({job.reason})' if job.reason else ''}" for job in live.values()]  # fmt: skip
        now = ", ".join(sorted(words))
        if now and now != told:
            say(f"waiting for {now}; Ctrl-C cancels it")
            told = now
        if left:
            time.sleep(_POLL)


def _gather(job_id: str, alike: list[PlannedJob], folder: Path) -> list[Finding]:
    """What the nodes of a job have found, the same of several nodes said once."""
    past = commands.find_record(job_id)
    nodes = commands.hostnames(past.nodes) if past is not None and past.nodes else []
    # A network file system may show a file some time after another node wrote it.
    deadline = time.monotonic() + (_UNSEEN if past is not None and past.state == "COMPLETED" else 0)
    while len(files := sorted(folder.glob("*.json"))) < len(nodes) and time.monotonic() < deadline:
        time.sleep(_POLL)
    answered = [file.stem for file in files]
    found: dict[Finding, list[str]] = {}
    for file in files:
        for fields in json.loads(file.read_text(encoding="utf-8")):
            found.setdefault(Finding(**fields), []).append(file.stem)
    findings = [finding.at(",".join(names)) for finding, names in found.items()]
    silent = [node for node in nodes if node not in answered]
    # What accounting remembers does not tell; the controller, which counts restarts, does.
    if past is not None and past.restarts is not None and not past.requeueable:
        findings.append(_not_requeueable(job_id).at(_stages(alike)))
    if silent or not answered:
        findings.append(_silent(past, folder).at(",".join(silent) or _stages(alike)))
    elif len(answered) > 1:
        findings.append(ok("shared", "every node writes to the same run directory").at(",".join(answered)))
    else:
        findings.append(
            ok("shared", "the node writes to the run directory that is seen here").at(answered[0])
        )
    return findings


def _silent(past: JobRecord | None, folder: Path) -> Finding:
    """What to say of nodes that have left nothing."""
    where = folder.parents[1]
    log = folder / "log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    code = past.exit_code.partition(":")[0] if past is not None else ""
    if code == str(_UNSHARED) or any(
        "No such file or directory" in line and str(folder) in line for line in lines
    ):
        return error(
            "shared",
            f"{where} is not there: the run directory is not shared",
            "set run_dir to a folder on the file system that login and compute nodes share (df -T tells)",
        )
    state = past.state if past is not None else "forgotten by Slurm"
    why = f": {lines[-1]}" if lines else ""
    return error(
        "nodes",
        f"the job ended {state} without an answer{why}",
        "see that slurm.setup and this Python work on the nodes, such as by srun",
    )


def _not_requeueable(job_id: str) -> Finding:
    return error(
        "requeue",
        f"job {job_id} asked to be requeueable and is not: the first preemption would end the chain",
        "ask an administrator which submit plugin takes --requeue away",
    )


def _stages(alike: list[PlannedJob]) -> str:
    return ", ".join(job.stage for job in alike)
