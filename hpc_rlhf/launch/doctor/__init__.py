"""The doctor: checks whether a run has what it needs on this machine, in Slurm and on the nodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.doctor import cluster, fit, hub, limits, machine, packages, sandbox, storage, visit, vllm
from hpc_rlhf.launch.doctor.finding import Finding, error, warning
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.render import Templates
from hpc_rlhf.run import manifest
from hpc_rlhf.slurm import commands
from hpc_rlhf.spec.job import JobSpec


def examine(specs: Sequence[JobSpec], beside: Path | None, on_cluster: bool, say: visit.Say) -> list[Finding]:
    """Check this machine and Slurm; with a spec, what it needs of them, and the nodes it would run on.

    Args:
        specs: the spec of a run, of every run of a sweep, or none. All are checked for what they take from
            the hub, the first for everything else.
        beside: as ``Templates`` takes it.
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
    jobs = plan.jobs if plan else ()
    ops = machine.ops_needed(json.loads(text) for job in jobs for text in templates.ds_configs(job).values())
    findings = packages.check()
    if spec is None or commands.available():  # a login node trains nothing
        findings += machine.examine(ops)
    else:
        stages = [spec.stage(name) for name in spec.stage_names]
        gpus = max(stage.slurm.gpus_per_node for stage in stages)
        spread = any(stage.slurm.ranks > 1 for stage in stages)
        findings += machine.examine(ops, gpus, {stage.precision for stage in stages}, spread)
        findings += sandbox.check(spec, spec.stage_names)
        findings += vllm.check(spec, spec.stage_names, gpus)
    if commands.available():
        try:
            findings += cluster.check_settings()
            if plan is not None:
                findings += [*limits.check(plan), *cluster.check_stages(plan, templates)]
        except HpcRlhfError as problem:
            fix = "check with scontrol ping whether the controller is up"
            findings.append(error("slurm", problem.message, fix).at("slurm"))
    elif spec is not None:
        message = "Slurm's commands are not on PATH: hpc-rlhf run works here, hpc-rlhf submit does not"
        findings.append(warning("slurm", message, "to submit, use a login node of the cluster"))
    if spec is None or plan is None:
        return findings
    trust = storage.check_trust(plan.run, spec.share == "group")
    findings += [*hub.check(specs), *fit.check(spec), trust]
    findings += vllm.check_files(spec) if commands.available() else []
    unfinished = [job.stage for job in plan.jobs if not manifest.is_done(plan.run.stage(job.stage))]
    needed = storage.bytes_needed(spec, plan.run, unfinished)
    if trust.level == "error":  # nothing is to be written or executed there
        return [*findings, storage.check_space(storage.nearest(plan.run.path), needed)]
    try:
        with storage.scratch(plan.run) as folder:
            findings += [storage.check_writes(folder, plan.run), storage.check_space(folder, needed)]
            if on_cluster and cluster.unfit(findings):
                say("no job was submitted: Slurm would reject it")
            elif on_cluster:
                findings += visit.visit(spec, plan, templates, folder, ops, say)
    except OSError as problem:
        findings.append(storage.refused(plan.run, problem))
    return findings
