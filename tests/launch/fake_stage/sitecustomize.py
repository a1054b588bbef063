"""Replaces real stages with fakes without torch, in every process that has this folder on PYTHONPATH.

FAKE_<STAGE> names the function below that each rank of the stage runs.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import types
from pathlib import Path

signals: list[int] = []


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SUBMITIT_LOCAL_GLOBALID", "0")))


def run_stage(run_dir: str, stage: str) -> None:
    from hpc_rlhf.run.events import Started
    from hpc_rlhf.run.layout import RunDir
    from hpc_rlhf.run.ledger import Ledger

    run = RunDir(Path(run_dir))
    facts = {**os.environ, "pid": os.getpid()}
    (run.path / f"seen-{stage}-{rank()}.json").write_text(json.dumps(facts))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    if rank() == 0:
        Ledger(run.ledger).append(Started(stage))
    globals()[os.environ.get(f"FAKE_{stage.upper()}", "finish")](run, stage)


def finish(run, stage, **values) -> None:
    """Succeed at once, with these metrics."""
    if rank():
        return
    from hpc_rlhf.run import manifest

    for step in range(1, 21):
        line = {"step": step, "total_steps": 20, "time": time.time(), "kind": "train", "loss": 1 / step, **values}
        with run.stage(stage).metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
    folder = run.stage(stage).model
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text("w")
    manifest.write(folder, {"step": 20, "seconds": 3, "stage": stage, "metrics": {"accuracy": 0.97}})


def planted(run, stage) -> None:
    """Get a reward that only depends on kl_coef; above 0.9, fail."""
    from hpc_rlhf.spec.load import read_spec

    kl_coef = read_spec(run.job_yaml).stages.ppo.kl_coef
    if kl_coef > 0.9:
        user_error(run, stage)
    finish(run, stage, reward=-abs(math.log10(kl_coef) + 1.2))


def until_signal(run, stage) -> None:
    """Run until a signal comes; take longer to save than submitit's controller would allow."""
    from hpc_rlhf.run.events import Interrupted, Saved
    from hpc_rlhf.run.ledger import Ledger

    while not signals:
        time.sleep(0.05)
    time.sleep(2.5)
    if rank() == 0:
        Ledger(run.ledger).append(Saved(stage, step=7))
        Ledger(run.ledger).append(Interrupted(stage, step=7))
    sys.exit(75)


def ignore_signals(run, stage) -> None:
    """Run forever, whatever signals come."""
    while True:
        time.sleep(1)


def one_killed(run, stage) -> None:
    """Rank 1 is killed; the others wait for it."""
    if rank() == 1:
        print("the last output of rank 1", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    ignore_signals(run, stage)


def killed_beside_another(run, stage) -> None:
    """Rank 1 is killed while the ranks of an earlier, killed launcher record their last event."""
    from hpc_rlhf.run.events import Interrupted
    from hpc_rlhf.run.ledger import Ledger

    if rank() == 0:
        Ledger(run.ledger).append(Interrupted(stage, attempt="another", step=3))
        (run.path / "recorded").touch()
    while not (run.path / "recorded").exists():
        time.sleep(0.05)
    one_killed(run, stage)


def killed_once(run, stage) -> None:
    """Rank 1 is killed in the first attempt."""
    first = run.path / "killed"
    if rank() == 1 and not first.exists():
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    from hpc_rlhf.run.ledger import Ledger

    if rank() == 0 and sum(event.name == "started" for event in Ledger(run.ledger).events(stage)) == 1:
        return
    finish(run, stage)


def user_error(run, stage) -> None:
    """Report a user error as real stages do."""
    from hpc_rlhf.run.events import Failed
    from hpc_rlhf.run.ledger import Ledger

    if rank() == 0:
        Ledger(run.ledger).append(Failed(stage, message="data.json: no such file", exit_code=2))
    sys.exit(2)


def late_user_error(run, stage) -> None:
    """Report a user error only after another machine's launcher has reported the exit code of its rank."""
    from hpc_rlhf.run.events import Failed
    from hpc_rlhf.run.ledger import Ledger

    while rank() == 0 and Ledger(run.ledger).last(Failed, stage) is None:
        time.sleep(0.05)
    user_error(run, stage)


def silent_mistake(run, stage) -> None:
    """Exit as a rank does that refuses files of somebody else, without a report."""
    print("the last output", file=sys.stderr, flush=True)
    sys.exit(2)


def connection_lost(run, stage) -> None:
    """Rank 1 fails; rank 0 loses its connection to it a little later."""
    from hpc_rlhf.run.events import Failed
    from hpc_rlhf.run.ledger import Ledger

    time.sleep(0.5 if rank() == 0 else 0)
    message = "RuntimeError: connection closed" if rank() == 0 else "OSError: disk full"
    Ledger(run.ledger).append(Failed(stage, message=message, exit_code=1))
    raise RuntimeError(message)


module = types.ModuleType("hpc_rlhf.train.entry")
module.run_stage = run_stage  # type: ignore[attr-defined]
sys.modules["hpc_rlhf.train.entry"] = module
