"""The entry point of a rank: joins the others, checks the inputs, runs the stage and ends the attempt."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hpc_rlhf import safe_path
from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, TO_BE_CONTINUED, HpcRlhfError
from hpc_rlhf.run import manifest, notify, secret
from hpc_rlhf.run.events import AttemptEvent, Cancelled, Failed, Finished, Hang, Interrupted, Requeued, Started
from hpc_rlhf.run.failures import own_failure
from hpc_rlhf.run.format import duration
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.retry_policy import Stop, StopKind, decide
from hpc_rlhf.slurm import commands
from hpc_rlhf.spec import hub, model_checks, reward_checks, rollout_checks
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.fields import seconds
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.train import job_start, machine
from hpc_rlhf.train.progress import say
from hpc_rlhf.train.runtime.launcher import launcher_ranks
from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag

if TYPE_CHECKING:  # torch takes seconds to load, and the signal handlers have to be in place first
    from hpc_rlhf.train.runtime.world import World

# Seconds for writing the report: srun kills a rank that ends a minute after the first, and the stage would fail.
_REPORT_TIMEOUT = 20.0
# Seconds between looks for a failure that rank 0 records, and how many of them.
_LOOK_INTERVAL, _LOOKS = 0.2, 10


def run_stage(run_dir: str, stage: str) -> None:
    """Run one stage on this rank, to its end, or until all ranks agree to stop after a signal.

    Returns when the stage is done, at once if it already was. Otherwise the process exits: with 75 after an
    agreed stop, or with the code of an HpcRlhfError.
    """
    stop = StopFlag()
    stop.install()
    # No progress bars in the log, no reports of what was loaded (loading checks it), and no warnings from one library
    # to another.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers uses it too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    run = RunDir(Path(run_dir))
    if manifest.is_done(run.stage(stage)):
        if launcher_ranks()[0] == 0:  # the attempt that finished it may have had no time to
            write_report(run)
        return
    attempt = Attempt(run, stage, stop)
    try:
        attempt.run()
    except HpcRlhfError as error:
        if not attempt.is_recorded_by_main(error):
            print(f"hpc-rlhf: {error}", file=sys.stderr, flush=True)
            with suppress(OSError):  # the error may be that the disk is full
                attempt.record(Failed(message=str(error), exit_code=error.exit_code))
        sys.exit(error.exit_code)
    except Exception as error:
        # Any rank may be the one that knows why; its traceback goes to its log.
        attempt.record(Failed(message=f"{type(error).__name__}: {error}", host=attempt.host))
        raise


def write_report(run: RunDir) -> None:
    """Write the run's report, in a process of its own: an error or a hang there is logged and costs the run nothing."""
    command = safe_path.module("hpc_rlhf.cli", "report", str(run.path))
    try:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=_REPORT_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"hpc-rlhf: the report was not written: {error}", file=sys.stderr, flush=True)


@dataclass
class Attempt:
    """One start of a stage on this rank.

    Attributes:
        name: Slurm's job id and restart count, or this machine's launch; the same on all ranks.
    """

    files: RunDir
    stage: str
    stop: StopFlag
    name: str = field(init=False)
    is_main: bool = False

    def __post_init__(self) -> None:
        self.job = os.environ.get("SLURM_JOB_ID")
        self.in_slurm = self.job is not None and os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.name = f"{self.job}-{self.restarts}" if self.in_slurm else f"local-{os.getppid()}-{int(time.time())}"

    def record(self, event: AttemptEvent | Cancelled) -> None:
        """Write an event of this attempt to the ledger."""
        Ledger(self.files.ledger).append(replace(event, stage=self.stage, attempt=self.name))

    def is_recorded_by_main(self, error: HpcRlhfError) -> bool:
        """Whether rank 0 records an error of this rank, because it has the same one, as for most user errors.

        If only this rank has it, for instance because a file is missing on its node, the other ranks merely
        lose their connection to it, and nobody else knows why.
        """
        if self.is_main:
            return False
        for _ in range(_LOOKS + launcher_ranks()[2]):  # at most one rank of a node records it
            failures = StageHistory.read(self.files, self.stage).attempt.all(Failed)
            if any(failure.message == str(error) for failure in failures):
                return True
            time.sleep(_LOOK_INTERVAL)
        return False

    def run(self) -> None:
        """Run the attempt, from joining the other ranks to leaving them."""
        spec = read_spec(self.files.job_yaml)
        hub.go_offline(spec)
        from hpc_rlhf.train.runtime import world as worlds

        self.is_main = launcher_ranks()[0] == 0
        settings = spec.stage(self.stage).slurm
        if self.is_main:
            self.start(settings)
        timeout = timedelta(seconds=seconds(settings.collective_timeout))
        world = worlds.join(settings.ranks, timeout, secret.read(self.files))
        self.name = world.on_main(lambda: self.name)
        try:
            self.train(spec, world)
        except StageStopped as stopped:
            world.barrier()  # no rank ends before all have saved: srun would kill the others
            self.end_stopped(stopped, settings.max_requeues)
        facts = manifest.require(self.files.stage(self.stage).model, f"the model of stage {self.stage}", deep=False)
        if self.is_main:
            say(self.stage, f"finished, after {duration(facts['seconds'])} of work")
            self.record(Finished(step=facts["step"], seconds=facts["seconds"]))
            notify.send_if_finished(self.files, spec, self.stage)
        worlds.leave()
        # While the job is preempted, its script may have little time left to let the dependents start.
        if self.is_main and not (self.stop.preempted and any(self.stage in spec.needs(s) for s in spec.stage_names)):
            write_report(self.files)

    def start(self, settings: SlurmSpec) -> None:
        """Record the start, and what rank 0 of a Slurm job does before its stage begins."""
        if self.in_slurm:
            job_start.record_previous_end(self.files, self.stage, str(self.job), self.restarts)
        started = Started(job_id=self.job, restart=self.restarts, ranks=settings.ranks, host=self.host)
        ranks = f"{settings.ranks} rank{'s' if settings.ranks > 1 else ''}"
        say(self.stage, f"attempt {self.name} on {self.host}, {ranks}; loading data and models")
        self.record(replace(started, age=machine.process_age(), versions=machine.versions()))
        if self.in_slurm:
            if commands.was_preempted(str(self.job)):
                self.stop.preempt()
            if settings.heal.enabled and commands.available():
                job_start.restore_sentinel(self.files, self.stage, str(self.job))

    def train(self, spec: JobSpec, world: World) -> None:
        """Check what the stage starts from, make this attempt its owner, and run it."""
        from hpc_rlhf.train.checkpoint.schedule import time_used
        from hpc_rlhf.train.context import StageContext
        from hpc_rlhf.train.runtime.watchdog import Watchdog

        for need in spec.needs(self.stage):
            folder = self.files.stage(need).model
            world.on_main(partial(manifest.require, folder, f"the model of stage {need}"))
        checks = (model_checks.problems, partial(reward_checks.of_stage, stage=self.stage), rollout_checks.problems)
        for where, what, hint in world.on_main(lambda: [each for check in checks for each in check(spec)]):
            raise HpcRlhfError(what, where=where, hint=hint)
        context = StageContext(spec, self.stage, self.files, world, self.stop, self.name)
        deadline = context.checkpoints.deadline
        if self.is_main and self.in_slurm:
            start, end = commands.start_and_end(str(self.job))
            deadline.end = time.monotonic() + end - start - time_used(start, time.time(), machine.script_age())
        with Watchdog(
            self.stop, self.name, lambda: deadline.passed, context.stop.heartbeat,
            lambda message: self.record(Hang(message=message, host=self.host)),
        ):  # fmt: skip
            context.checkpoints.store.claim()
            try:
                importlib.import_module(f"hpc_rlhf.train.stages.{self.stage}").run(context)
                context.checkpoints.commit()
                context.checkpoints.store.wait_until_idle()
            except BaseException:
                context.close(quick=True)  # the grace period may be short
                raise
            context.close()

    def end_stopped(self, stopped: StageStopped, max_requeues: int) -> NoReturn:
        """Requeue this Slurm job, or record that the user has to run the stage again; then exit."""
        if self.is_main and self.in_slurm:
            history = StageHistory.read(self.files, self.stage)
            if own_failure(history.attempt) is not None:
                sys.exit(RUN_FAILED)  # another rank failed, and srun stopped this one
            stopping = Requeued(step=stopped.step, reason=stopped.reason)
            verdict = decide(history.since_user, max_requeues, stopping=stopping)
            if isinstance(verdict, Stop):
                raise HpcRlhfError(
                    verdict.why,
                    where=f"stage {self.stage}, step {stopped.step}",
                    hint=verdict.hint or "the checkpoint is kept: hpc-rlhf heal continues, with a new budget",
                    exit_code=RUN_FAILED if verdict.kind is StopKind.BUDGET_SPENT else INPUT_WRONG,
                )
            say(self.stage, f"saved at step {stopped.step}: {stopped.reason}; the job is requeued")
            self.requeue(stopped.step, stopped.reason)
        elif self.is_main:
            say(self.stage, f"saved at step {stopped.step}")
            self.record(Interrupted(step=stopped.step))
        if self.in_slurm:
            self.stop.restore()
            time.sleep(10)  # rank 0 is requeueing the job, and Slurm then ends this step
        sys.exit(TO_BE_CONTINUED)

    def requeue(self, step: int, reason: str) -> None:
        """Requeue this Slurm job, unless the user cancelled it or Slurm requeues it anyway."""
        why = commands.why_ended(str(self.job), self.restarts) if self._reaches_slurm else ""
        if why == "cancelled":
            self.record(Cancelled(job_id=self.job))
        if why in ("cancelled", "requeued"):  # the next attempt records who requeued it
            sys.exit(TO_BE_CONTINUED)
        self.record(Requeued(step=step, reason=why or reason))
        if not self._reaches_slurm:  # in a container; the batch script outside handles the request
            self.files.stage(self.stage).requeue_request.touch()
            sys.exit(TO_BE_CONTINUED)
        commands.requeue(str(self.job))

    @property
    def _reaches_slurm(self) -> bool:
        return shutil.which("scontrol") is not None
