"""Ranks that wait for a signal to stop in the midst of a step of PPO or GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tests.cluster import Cluster, config, wait_until
from tests.cluster.chain import STAGE_SECONDS

# In a job's first attempts, one after the other, ranks wait in the third step.
_SITE = """
import os, pathlib, sys, threading, time

PLACE, AT = dict(enumerate({places})).get(int(os.environ.get("SLURM_RESTART_COUNT", 0)), (None, None))

def pausing(trainer, call):
    count = 0
    def paused(*args):
        nonlocal count
        result, count = call(*args), count + 1
        if count == AT:
            pathlib.Path(__file__).with_name(f"{{PLACE}}-{{os.environ['SLURM_PROCID']}}").touch()
            while not trainer.check.__self__.flag.code:
                time.sleep(0.05)
            return PLACE == "roll_out" or result
        return result
    return paused

def patch():
    module = "hpc_rlhf.train.stages.policy.trainer"
    while not hasattr(sys.modules.get(module), "as_tensor"):  # its last line
        time.sleep(0.001)
    policy, count = sys.modules[module].PolicyTrainer, 0
    method = getattr(policy, PLACE)

    def patched(trainer, *args):
        nonlocal count
        count += 1
        if count == 3 and PLACE == "score":
            return pausing(trainer, method)(trainer, *args)
        if count == 3:  # the third argument is called at every token, or before every optimizer step
            args = (*args[:2], pausing(trainer, args[2]), *args[3:])
        return method(trainer, *args)

    setattr(policy, PLACE, patched)

if "SLURM_PROCID" in os.environ and PLACE:
    threading.Thread(target=patch, daemon=True).start()
"""


class Pauses:
    """A folder for PYTHONPATH.

    Args:
        places: methods of ``PolicyTrainer``, one for each attempt: roll_out, score or learn, and the call at which
            ranks wait: of what roll_out polls, of score itself, or of what learn calls before each optimizer step.
        ranks: of the stage.
    """

    def __init__(self, folder: Path, places: Mapping[str, int], ranks: int) -> None:
        self.folder, self.places, self.ranks = folder, places, ranks
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_SITE.format(places=list(places.items())))

    def preempt(self, cluster: Cluster, nodes: str) -> None:
        """Preempt the ranks in each of the places; a job with a higher priority takes the GPUs of their nodes."""
        for place in self.places:
            wait_until(partial(self.all_wait, place), STAGE_SECONDS, f"all ranks wait in {place}")
            whole = (f"--nodelist={nodes}", f"--gpus-per-node={config.GPUS}")
            cluster.sbatch("--partition=high", *whole, "--output=/dev/null", "--wrap=true")

    def all_wait(self, place: str) -> bool:
        return all((self.folder / f"{place}-{rank}").exists() for rank in range(self.ranks))
