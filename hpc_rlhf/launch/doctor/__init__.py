"""The doctor: checks whether a run has what it needs on this machine, in Slurm and on the nodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate import disk
from hpc_rlhf.launch.doctor import cluster, fit, hub, machine, packages, storage, visit
from hpc_rlhf.launch.doctor.finding import Finding, error, warning
from hpc_rlhf.launch.plan import Plan, make_plan
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.slurm import commands
from hpc_rlhf.spec.job import JobSpec


def examine(specs: Sequence[JobSpec], beside: Path | None, on_cluster: bool, say: visit.Say) -> list[Finding]:
    """Check this machine and Slurm; with a spec, what it needs of them, and the nodes it would run on.

    Args:
        specs: the spec of a run, of every run of a sweep, or none. All are checked for what they take from
            the hub, the first for everything else.
        beside: folder of the job file; templates in its ``templates/`` win over ours.
        on_cluster: submit a short job that checks the nodes, and wait for it.
        say: called with progress messages.

    Raises:
        HpcRlhfError: ``on_cluster`` without a spec or without Slurm, or a spec that makes no plan.
    """
    spec = specs[0] if specs else None
    if on_cluster and (spec is None or not commands.available()):
        hint = "name a job file" if spec is None else "run it on a login node of the cluster"
        raise HpcRlhfError("--on-cluster needs a job file, and Slurm's commands on PATH", hint=hint)
    plan = make_plan(spec) if spec is not None else None
    templates = Templates(beside)
    ops = machine.ops_needed(_configs(plan, templates))
    findings = [*packages.check(), *_machine(spec, ops, trains_here=not commands.available())]
    if commands.available():
        findings += _slurm(plan, templates)
    elif spec is not None:
        message = "Slurm's commands are not on PATH: hpc-rlhf run works here, hpc-rlhf submit does not"
        findings.append(warning("slurm", message, "to submit, use a login node of the cluster"))
    if spec is None or plan is None:
        return findings
    findings += [*hub.check(specs), *fit.check(spec)]
    findings.append(storage.check_trust(plan.run))
    try:
        with storage.scratch(plan.run) as folder:
            findings += [storage.check_writes(folder, plan.run), storage.check_space(folder, disk.run_bytes(spec))]
            if on_cluster and cluster.unfit(findings):
                say("no job was submitted: Slurm would reject it")
            elif on_cluster:
                findings += visit.visit(spec, plan, templates, folder, ops, say)
    except OSError as problem:
        findings.append(storage.refused(plan.run, problem))
    return findings


def _configs(plan: Plan | None, templates: Templates) -> list[dict[str, object]]:
    """The DeepSpeed config of every model of every stage."""
    jobs = () if plan is None else plan.jobs
    return [json.loads(text) for job in jobs for text in templates.ds_configs(job).values()]


def _machine(spec: JobSpec | None, ops: list[str], trains_here: bool) -> list[Finding]:
    facts = machine.ask(ops)
    if isinstance(facts, Finding):
        return [facts]
    if spec is None or not trains_here:
        return machine.check(facts, None, (), False)
    stages = [spec.stage(name) for name in spec.stage_names]
    gpus = max(stage.slurm.gpus_per_node for stage in stages)
    spread = any(stage.slurm.ranks > 1 for stage in stages)
    return machine.check(facts, gpus, {stage.precision for stage in stages}, spread)


def _slurm(plan: Plan | None, templates: Templates) -> list[Finding]:
    try:
        return [
            *(each.at("slurm") for each in cluster.check_settings()),
            *(cluster.check_stages(plan, templates) if plan else []),
        ]
    except HpcRlhfError as problem:
        return [error("slurm", problem.message, "check with scontrol ping whether the controller is up").at("slurm")]
