"""Renders a plan: sbatch scripts, DeepSpeed configs and a hostfile template for every stage."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from hpc_rlhf import safe_path
from hpc_rlhf.errors import TO_BE_CONTINUED, HpcRlhfError
from hpc_rlhf.launch import inputs
from hpc_rlhf.launch.plan import Plan, PlannedJob
from hpc_rlhf.run import manifest
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.run.layout import RunDir, SweepDir
from hpc_rlhf.slurm import commands
from hpc_rlhf.slurm.jobs import time_limit
from hpc_rlhf.spec import sizes
from hpc_rlhf.spec.batch import Batch
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.training import StageSpec

if TYPE_CHECKING:
    from jinja2 import Environment

_SENTINEL_SECONDS = 30.0 * 60  # it waits for storage and for Slurm's controller
_PACKAGE = Path(__file__).parents[1]
# A wheel carries the templates inside the package; a checkout has them beside it.
_OURS = (_PACKAGE / "_templates", _PACKAGE.parent / "templates")


class Templates:
    """The built-in templates, each of which a user's own of the same name replaces."""

    def __init__(self, beside: Path | None = None) -> None:
        """Read the user's templates, so that what is rendered later is what was checked.

        Args:
            beside: folder of the job file; its ``templates/`` is searched first.

        Raises:
            HpcRlhfError: somebody else could change one, or it cannot be read.
        """
        own = {} if beside is None else inputs.templates(beside)
        ours = [folder for folder in reversed(_OURS) if folder.is_dir()]
        self._folders = [*([beside / "templates"] if beside is not None and own else []), *ours]
        self._environment = _environment(own, ours)

    def script(self, plan: Plan, job: PlannedJob, command: str) -> str:
        """The sbatch script of a job; ``command`` is what each of srun's tasks runs."""
        engine = plan.run.stage(job.stage).engine
        return self._script(
            "stage.sbatch.j2",
            plan,
            job,
            hostfile=plan.run.stage(job.stage).hostfile,
            request=plan.run.stage(job.stage).requeue_request,
            manifest=plan.run.stage(job.stage).model / manifest.NAME,
            hostfile_template=plan.run.hostfile_template(job.stage),
            command=command,
            own_nodes=job.own_nodes,
            servers=job.servers,
            agent=f"{rank_python(job)} hpc_rlhf.train.rollout.vllm.agent {shlex.quote(str(engine))}",
        )

    def sentinel(self, plan: Plan, job: PlannedJob) -> str:
        """The sbatch script of the small job that repairs the chain when ``job`` fails."""
        command = safe_path.module("hpc_rlhf.cli", "heal", "--sentinel", str(plan.run.path))
        about = f"The sentinel of stage {job.stage} of run {plan.name}: repairs the chain when that stage's job fails."
        return self._sentinel(plan, job, command, about=about)

    def search_sentinel(self, name: str, plan: Plan, folder: SweepDir) -> str:
        """The sbatch script of the small job that starts the next wave of a search; ``plan`` is that of a trial."""
        command = safe_path.module("hpc_rlhf.cli", "submit", "--sentinel", str(folder.spec))
        about = (
            f"The sentinel of the search in {folder.path}: starts the next wave when the trials of this one have ended."
        )
        job = replace(plan.jobs[-1], job_name=f"{name}.search")
        return self._sentinel(plan, job, command, about=about, run=RunDir(folder.path), logs=folder.path)

    def _sentinel(self, plan: Plan, job: PlannedJob, command: Sequence[str], **own: object) -> str:
        heal = job.slurm.heal
        setup = job.slurm.setup if heal.setup is None else heal.setup
        python = shlex.quote(sys.executable)  # for users' templates that were written before there was a command
        time = heal.time or _sentinel_minutes(job.slurm)
        common = {"command": shlex.join(command), "python": python, "heal": heal, "setup": setup, "time": time}
        return self._script("sentinel.sbatch.j2", plan, job, **common, **own)

    def doctor(self, plan: Plan, job: PlannedJob, folder: Path, command: str, unshared: int) -> str:
        """The sbatch script of the short job that checks the nodes of ``job``; it exits with ``unshared`` if
        its first node does not see ``folder``."""
        own = {"logs": folder, "folder": folder, "command": command, "unshared": unshared}
        return self._script("doctor.sbatch.j2", plan, job, **own)

    def serve(self, plan: Plan, job: PlannedJob, command: str) -> str:
        """The sbatch script of a job that serves the model of ``job``'s stage."""
        return self._script("serve.sbatch.j2", plan, job, command=command, to_be_continued=TO_BE_CONTINUED)

    def hostfile(self, plan: Plan, job: PlannedJob) -> str:
        """The hostfile's line for one node; the script repeats it for every node of the allocation."""
        return self._render("hostfile.j2", plan=plan, job=job, slurm=job.slurm)

    def ds_configs(self, job: PlannedJob) -> dict[str, str]:
        """The DeepSpeed config of each of a stage's models, as ``StageSpec.strategies`` names them.

        Raises:
            HpcRlhfError: one is not JSON, or its batch differs from the plan.
        """
        return {model: self._ds_config(job, strategy) for model, strategy in job.spec.strategies.items()}

    def _ds_config(self, job: PlannedJob, stage: StageSpec) -> str:
        name = "ds_config.json.j2"
        text = self._render(name, job=job, batch=job.batch, stage=stage, sizes=sizes)
        file = self._environment.get_template(name).filename
        try:
            config = json.loads(text)
        except ValueError as error:
            raise HpcRlhfError(f"the DeepSpeed config of {job.stage} is not JSON: {error}", where=file) from error
        wrong = _batch_differences(config, job.batch)
        if wrong:
            raise HpcRlhfError(
                f"the DeepSpeed config of {job.stage} does not have the batch of the spec: {', '.join(wrong)}",
                where=file,
                hint="use {{ batch.micro }} and {{ batch.accumulation }} in the template, and set micro_batch "
                "and global_batch in the spec",
            )
        return text

    def _script(self, template: str, plan: Plan, job: PlannedJob, **own: object) -> str:
        """An sbatch script, from the values that every template of one has and its own."""
        logs = plan.run.stage(job.stage).logs
        common = {"plan": plan, "job": job, "slurm": job.slurm, "run": plan.run, "logs": logs}
        return self._render(template, **{**common, **own})

    def _render(self, template: str, **values: object) -> str:
        try:
            return self._environment.get_template(template).render(**values)
        except Exception as error:  # a user's template can raise anything
            reason = getattr(error, "message", None) or str(error) or type(error).__name__
            raise HpcRlhfError(
                f"the template does not render: {reason}",
                where=_place(error, template),
                hint="templates are searched in " + ", then ".join(map(str, self._folders)),
            ) from error


def _sentinel_minutes(settings: SlurmSpec) -> int:
    """The time limit of a sentinel: the stage's, which its partition allows, or what a partition of its own allows."""
    limits = [_SENTINEL_SECONDS]
    if settings.heal.partition is None:
        limits.append(time_limit(settings.time) or math.inf)
    elif commands.available():
        with suppress(HpcRlhfError):  # sbatch and doctor say what is wrong
            limits.append(commands.partition_limit(settings.heal.partition))
    return max(1, int(min(limits)) // 60)


def _batch_differences(config: Mapping[str, object], batch: Batch) -> list[str]:
    """Batch sizes in a DeepSpeed config that differ from the plan. DeepSpeed derives those that it leaves out."""
    micro, accumulation, total = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"
    expected = {micro: batch.micro, accumulation: batch.accumulation, total: batch.global_}
    different = {key: value for key, value in expected.items() if config.get(key, value) != value}
    wrong = [f"{key} is {config[key]}, expected {value}" for key, value in different.items()]
    if micro not in config and not (accumulation in config and total in config):
        wrong.append(f"{micro} is missing, expected {batch.micro}")
    elif accumulation not in config and total not in config and batch.accumulation != 1:
        wrong.append(f"{accumulation} is missing, expected {batch.accumulation}")
    return wrong


def render(plan: Plan, out_dir: Path, beside: Path | None = None) -> list[Path]:
    """Write everything that would be submitted into a folder, and return the files written."""
    templates, run = Templates(beside), plan.run
    out_dir.mkdir(parents=True, exist_ok=True)
    texts: dict[Path, str] = {}
    for job in plan.jobs:
        texts[run.sbatch(job.stage)] = templates.script(plan, job, rank_command(plan, job))
        if job.slurm.heal.enabled:
            texts[run.sentinel(job.stage)] = templates.sentinel(plan, job)
        for model, text in templates.ds_configs(job).items():
            texts[run.ds_config(job.stage, model)] = text
        texts[run.hostfile_template(job.stage)] = templates.hostfile(plan, job)
    written = {out_dir / path.name: text for path, text in texts.items()}
    for path, text in written.items():
        write_atomically(path, text)  # ranks of a job that is starting may be reading the old file
    return list(written)


def rank_python(job: PlannedJob) -> str:
    """The Python that runs a rank, with the options before a module's name: this Python, or that of the container."""
    if job.slurm.container is None:
        return shlex.join([sys.executable, *safe_path.THIS_PYTHON])
    return shlex.join(["python3", *safe_path.ANY_PYTHON])


def rank_command(plan: Plan, job: PlannedJob) -> str:
    """What each of srun's tasks runs: a rank, or the launcher of a node's ranks."""
    if job.slurm.launcher != "srun":
        words = shlex.join([str(plan.run.path), job.stage, job.slurm.launcher])
        return f"{rank_python(job)} hpc_rlhf.launch.node {words}"
    logs = shlex.quote(str(plan.run.stage(job.stage).logs))
    return f"{rank_python(job)} hpc_rlhf.rank {logs}"


def _environment(own: Mapping[str, inputs.Template], ours: list[Path]) -> Environment:
    """A sandboxed Jinja environment: a template that was copied from someone else may do what a spec may, no more."""
    from jinja2 import ChoiceLoader, FileSystemLoader, FunctionLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def load(name: str) -> tuple[str, str, Callable[[], bool]] | None:
        return (own[name].content.decode(), str(own[name].path), lambda: True) if name in own else None

    class Sandbox(ImmutableSandboxedEnvironment):
        """Methods of paths read and write files, and some of pydantic's load pickles."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, PurePath) and not isinstance(value, str | PurePath):
                return False
            return super().is_safe_attribute(obj, attr, value) and not (
                isinstance(obj, BaseModel) and hasattr(BaseModel, attr)
            )

    environment = Sandbox(
        loader=ChoiceLoader([FunctionLoader(load), FileSystemLoader(ours)]),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sbatch"] = _quote_for_sbatch
    environment.filters["bash"] = lambda value: shlex.quote(str(value))
    environment.filters["json"] = json.dumps
    return environment


def _place(error: Exception, template: str) -> str:
    """File and line of a template error, from Jinja's syntax error or from the traceback."""
    file, line = getattr(error, "filename", None) or template, getattr(error, "lineno", None)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.endswith(".j2"):
            file, line = frame.filename, frame.lineno
    return f"{file}:{line}" if line else str(file)


def _quote_for_sbatch(value: object) -> str:
    """Quote a value of a ``#SBATCH`` line. Unlike bash, sbatch interprets backslashes in any quotes."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'
