"""Where a rank enters: joins the others, checks the inputs, runs the stage, ends the attempt."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest, notify
from hpc_rlhf.run.events import (
    AttemptEvent,
    Cancelled,
    Failed,
    Finished,
    Hang,
    Interrupted,
    Requeued,
    Started,
)
from hpc_rlhf.run.failures import own_failure
from hpc_rlhf.run.history import StageHistory
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.run.ledger import Ledger
from hpc_rlhf.run.retry_policy import Stop, StopKind, decide
from hpc_rlhf.slurm import commands
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.fields import seconds
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.train import job_start, reporting
from hpc_rlhf.train.runtime.launcher import launcher_ranks
from hpc_rlhf.train.runtime.stop_signals import StageStopped, StopFlag

if TYPE_CHECKING:  # torch takes seconds to load: the handlers are in place first
    from hpc_rlhf.train.runtime.world import World

# What a rank ends with when it saved and is to be run again (sysexits.h: EX_TEMPFAIL).
TO_BE_CONTINUED = 75


def run_stage(run_dir: str, stage: str) -> None:
    """Run one stage on this rank, to its end or to the next safe point after a signal.

    Returns when the stage is done, at once if it was done before. Otherwise the process exits:
    with 75 after an agreed stop, or with the code of a HpcRlhfError, whose message rank 0 prints.
    """
    stop = StopFlag()
    stop.install()
    keep_log_readable()
    run = RunDir(Path(run_dir))
    if manifest.is_done(run.stage(stage)):
        if launcher_ranks()[0] == 0:  # the attempt that finished it may have had no time for that
            reporting.write_report(run)
        return
    attempt = Attempt(run, stage, stop)
    try:
        attempt.run()
    except HpcRlhfError as error:
        if attempt.is_main:
            attempt.note(Failed(message=str(error), exit_code=error.exit_code))
            print(f"hpc-rlhf: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception as error:
        # Any rank may be the one that knows why; its traceback goes to its log.
        attempt.note(Failed(message=f"{type(error).__name__}: {error}", host=attempt.host))
        raise


def process_age() -> float:
    """Seconds since this process began, most of which its imports took; 0 where the system does not tell."""
    try:
        after_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return 0.0
    return round(max(0.0, age), 3)


def script_age() -> float | None:
    """Seconds since the batch script began, on the same machine; None where that cannot be told."""
    try:
        up = float(Path("/proc/uptime").read_text().split()[0])
        age = up - float(os.environ["HPC_RLHF_SCRIPT_BEGAN"])
    except (OSError, KeyError, ValueError):
        return None
    return age if age >= 0 else None


def keep_log_readable() -> None:
    """No progress bars in a log file, and no notes that one library has for another."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers heeds it too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


@dataclass
class Attempt:
    """One start of a stage on this rank.

    Attributes:
        name: Slurm's job id and restart count, or this machine's launch; the same on all ranks.
        is_main: whether this is rank 0, known once the ranks joined.
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
        self.name = (
            f"{self.job}-{self.restarts}" if self.in_slurm else f"local-{os.getppid()}-{int(time.time())}"
        )

    def note(self, event: AttemptEvent | Cancelled) -> None:
        """Write an event of this attempt to the ledger."""
        Ledger(self.files.ledger).append(replace(event, stage=self.stage, attempt=self.name))

    def run(self) -> None:
        """The attempt from joining the ranks to leaving them.

        Raises:
            HpcRlhfError: something a user can mend.
        """
        spec = read_spec(self.files.job_yaml)
        hub.go_offline(spec)
        from hpc_rlhf.train.runtime import world as worlds

        self.is_main = launcher_ranks()[0] == 0
        settings = spec.stage(self.stage).slurm
        if self.is_main and self.in_slurm:
            job_start.note_ending_before(self.files, self.stage, str(self.job), self.restarts)
        if self.is_main:
            started = Started(job_id=self.job, restart=self.restarts, ranks=settings.ranks, host=self.host)
            self.note(replace(started, age=process_age(), versions=reporting.versions()))
        if self.is_main and self.in_slurm:
            if commands.was_preempted(str(self.job)):
                self.stop.preempt()
            if settings.heal.enabled and commands.available():
                job_start.put_sentinel_back(self.files, self.stage, str(self.job))
        world = worlds.join(settings.ranks, timedelta(seconds=seconds(settings.collective_timeout)))
        self.name = world.on_main(lambda: self.name)
        try:
            self.train(spec, world)
        except StageStopped as stopped:
            world.barrier()  # nobody ends before everybody has saved: srun would kill the rest
            self.end_stopped(stopped, spec)
        facts = manifest.require(
            self.files.stage(self.stage).model, f"the model of stage {self.stage}", deep=False
        )
        if self.is_main:
            self.note(Finished(step=facts["step"], seconds=facts["seconds"]))
            notify.send_if_finished(self.files, spec, self.stage)
        worlds.leave()
        if self.is_main and not self.stop.preempted:
            reporting.write_report(self.files)
        if self.is_main and self.in_slurm and self.stop.preempted:
            # Slurm may record a job that ends while it is preempted as PREEMPTED, and then its dependents never
            # start. Run again, it finds its model complete, ends at once, and is COMPLETED.
            self.requeue(int(facts["step"]), "preempted")

    def train(self, spec: JobSpec, world: World) -> None:
        """Check what the stage starts from, make this attempt its owner, and run it."""
        from hpc_rlhf.train.checkpoint.schedule import time_used
        from hpc_rlhf.train.context import StageContext
        from hpc_rlhf.train.runtime.watchdog import Watchdog

        for need in spec.needs(self.stage):
            folder = self.files.stage(need).model
            world.on_main(partial(manifest.require, folder, f"the model of stage {need}"))
        context = StageContext(spec, self.stage, self.files, world, self.stop, self.name)
        if self.is_main and self.in_slurm:
            start, end = commands.start_and_end(str(self.job))
            context.checkpoints.deadline.end = (
                time.monotonic() + end - start - time_used(start, time.time(), script_age())
            )
        with Watchdog(
            self.stop, self.name, lambda: context.checkpoints.deadline.passed, context.stop.heartbeat,
            lambda message: self.note(Hang(message=message, host=self.host)),
        ):  # fmt: skip
            context.checkpoints.store.claim()
            try:
                importlib.import_module(f"hpc_rlhf.train.stages.{self.stage}").run(context)
                context.checkpoints.commit()
                context.checkpoints.store.settle()
            except BaseException:
                context.close(hurry=True)  # the grace may be short
                raise
            context.close()

    def end_stopped(self, stopped: StageStopped, spec: JobSpec) -> NoReturn:
        """Requeue this Slurm job, or note that somebody is to run the stage again; then end."""
        if self.is_main and self.in_slurm:
            history = StageHistory.read(self.files, self.stage)
            if own_failure(history.attempt) is not None:
                sys.exit(
                    RUN_FAILED
                )  # Slurm stopped this rank because another failed; the sentinel judges that
            stopping = Requeued(step=stopped.step, reason=stopped.reason)
            max_requeues = spec.stage(self.stage).slurm.max_requeues
            verdict = decide(history.since_user, max_requeues, stopping=stopping)
            if isinstance(verdict, Stop):
                raise HpcRlhfError(
                    verdict.why,
                    where=f"stage {self.stage}, step {stopped.step}",
                    hint=verdict.hint or "the checkpoint is kept: hpc-rlhf heal continues, with a new budget",
                    exit_code=RUN_FAILED if verdict.kind is StopKind.BUDGET_SPENT else INPUT_WRONG,
                )
            self.requeue(stopped.step, stopped.reason)
        elif self.is_main:
            self.note(Interrupted(step=stopped.step))
        if self.in_slurm:
            self.stop.restore()
            time.sleep(10)  # rank 0 is requeueing the job, and Slurm then ends this step
        sys.exit(TO_BE_CONTINUED)

    def requeue(self, step: int, reason: str) -> None:
        """Have this Slurm job run again, unless a person cancelled it, or it will anyway."""
        reachable = shutil.which("scontrol") is not None
        why = commands.why_ended(str(self.job), self.restarts) if reachable else ""
        if why == "cancelled":
            self.note(Cancelled(job_id=self.job))
        if why in ("cancelled", "requeued"):  # the next attempt tells who requeued it
            sys.exit(TO_BE_CONTINUED)
        self.note(Requeued(step=step, reason=why or reason))
        if not reachable:  # from inside a container; the batch script outside sees the request
            self.files.stage(self.stage).requeue_request.touch()
            sys.exit(TO_BE_CONTINUED)
        commands.requeue(str(self.job))
