"""Where a rank enters: joins the others, checks the inputs, runs the stage, ends the attempt."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from hpc_rlhf import manifest, slurm
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.ledger import Ledger
from hpc_rlhf.rundir import RunDir
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.model import JobSpec
from hpc_rlhf.train.preemption import StageStopped, StopFlag

# What a rank ends with when it saved and is to be run again (sysexits.h: EX_TEMPFAIL).
TO_BE_CONTINUED = 75


def attempt_name() -> str:
    """This attempt at the stage: Slurm's job id and restart count, or this machine's launch."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get("SUBMITIT_EXECUTOR") != "local":
        return f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return f"local-{os.environ.get('SUBMITIT_LOCAL_JOB_ID', os.getppid())}-{int(time.time())}"


def run_stage(run_dir: str, stage: str) -> None:
    """Run one stage on this rank, to its end or to the next safe point after a signal.

    Returns when the stage is done, at once if it was done before. Otherwise the process exits:
    with 75 after an agreed stop, or with the code of a HpcRlhfError, whose message rank 0 prints.
    """
    stop = StopFlag()
    stop.install()
    run = RunDir(Path(run_dir))
    if manifest.defect(run.stage(stage).model, deep=False) is None:
        return
    ledger = Ledger(run.ledger)
    is_main = False
    attempt = attempt_name()
    try:
        spec = read_spec(run.job_yaml)
        from hpc_rlhf.train import world as worlds

        is_main = worlds.launcher_ranks()[0] == 0
        if is_main:
            _note_start(ledger, spec, stage, attempt)
        world = worlds.join(spec.stage(stage).slurm.ranks)
        attempt = world.on_main(lambda: attempt)
        _run(spec, stage, run, world, stop, attempt)
        if is_main:
            facts = manifest.read(run.stage(stage).model) or {}
            ledger.append(
                "finished", stage, attempt=attempt, step=facts.get("step"), seconds=facts.get("seconds")
            )
        worlds.leave()
    except StageStopped as stopped:
        _stopped(stopped, spec, stage, attempt, ledger, world.barrier, is_main, stop)
    except HpcRlhfError as error:
        if is_main:
            ledger.append("failed", stage, attempt=attempt, message=str(error), exit_code=error.exit_code)
            print(f"hpc-rlhf: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception as error:
        # Any rank may be the one that knows why; its traceback goes to its log.
        ledger.append(
            "failed",
            stage,
            attempt=attempt,
            message=f"{type(error).__name__}: {error}",
            host=socket.gethostname(),
            exit_code=RUN_FAILED,
        )
        raise


def _note_start(ledger: Ledger, spec: JobSpec, stage: str, attempt: str) -> None:
    ledger.append(
        "started",
        stage,
        attempt=attempt,
        job_id=os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        ranks=spec.stage(stage).slurm.ranks,
        host=socket.gethostname(),
    )


def _run(spec: JobSpec, stage: str, run: RunDir, world: object, stop: StopFlag, attempt: str) -> None:
    import importlib

    from hpc_rlhf.train.context import StageContext
    from hpc_rlhf.train.world import World

    assert isinstance(world, World)
    for need in spec.needs(stage):
        folder = run.stage(need).model
        world.on_main(lambda folder=folder, need=need: manifest.require(folder, f"the model of stage {need}"))  # type: ignore[misc]
    context = StageContext(spec, stage, run, world, stop, attempt)
    context.store.claim()
    importlib.import_module(f"hpc_rlhf.train.stages.{stage}").run(context)


def _stopped(
    stopped: StageStopped,
    spec: JobSpec,
    stage: str,
    attempt: str,
    ledger: Ledger,
    barrier: object,
    is_main: bool,
    stop: StopFlag,
) -> NoReturn:
    """Requeue this Slurm job, or note that a person is to run the stage again; then end."""
    job = os.environ.get("SLURM_JOB_ID")
    in_slurm = job is not None and os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
    facts = {"attempt": attempt, "step": stopped.step}
    assert callable(barrier)
    barrier()  # nobody ends before everybody has saved: srun would kill the rest
    stop.restore()
    if is_main and not in_slurm:
        ledger.append("interrupted", stage, **facts)
    if is_main and in_slurm:
        budget = spec.stage(stage).slurm.max_requeues
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= budget:
            message = f"requeued {budget} times, which is all that slurm.max_requeues allows; stopped at step {stopped.step}"
            ledger.append("failed", stage, **facts, message=message, exit_code=RUN_FAILED)
            print(f"hpc-rlhf: {message}", file=sys.stderr, flush=True)
            sys.exit(RUN_FAILED)
        ledger.append("requeued", stage, **facts, reason=stopped.reason)
        slurm.requeue(str(job))
    if in_slurm:
        time.sleep(60)  # Slurm ends this step as it requeues the job
    sys.exit(TO_BE_CONTINUED)
