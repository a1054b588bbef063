"""The sbatch options that this tool owns."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Options that may not be passed through `slurm.extra`, because they have a field of their own or because the
# tool needs them itself, and what to do instead.
_OWNED = {
    "account": "use slurm.account",
    "array": "a stage is one job",
    "chdir": "jobs start in the run directory",
    "clusters": "a run stays on the cluster that it is submitted to",
    "comment": "use slurm.comment",
    "constraint": "use slurm.constraint",
    "container": "use slurm.container",
    "cpus-per-gpu": "use slurm.cpus_per_gpu",
    "cpus-per-task": "use slurm.cpus_per_gpu",
    "dependency": "the stages depend on each other as `hpc-rlhf plan` shows",
    "error": "logs are in the run directory; `hpc-rlhf logs` shows them",
    "exclude": "use slurm.exclude",
    "exclusive": "use slurm.exclusive",
    "export": "the ranks need the environment; use slurm.setup to change it",
    "export-file": "use slurm.setup",
    "gpus": "use slurm.nodes and slurm.gpus_per_node",
    "gpus-per-node": "use slurm.gpus_per_node",
    "gpus-per-task": "use slurm.gpus_per_node",
    "gres": "use slurm.gres",
    "help": "with it sbatch only prints",
    "hold": "use `scontrol hold` on the submitted job",
    "input": "a stage reads no input",
    "job-name": "use name",
    "kill-on-invalid-dep": "the chain decides what happens to a stage whose input failed",
    "licenses": "use slurm.licenses",
    "mail-type": "use slurm.mail_type",
    "mail-user": "use slurm.mail_user",
    "mem": "use slurm.mem",
    "no-kill": "a stage ends when one of its ranks does",
    "no-requeue": "a stage survives preemption by being requeued",
    "nodefile": "use slurm.nodelist",
    "nodelist": "use slurm.nodelist",
    "nodes": "use slurm.nodes",
    "ntasks": "use slurm.nodes and slurm.ranks_per_node",
    "ntasks-per-gpu": "use slurm.ranks_per_node",
    "ntasks-per-node": "use slurm.ranks_per_node",
    "open-mode": "logs are always appended to, because a requeued stage continues them",
    "output": "logs are in the run directory; `hpc-rlhf logs` shows them",
    "parsable": "the tool parses sbatch's output",
    "partition": "use slurm.partition",
    "qos": "use slurm.qos",
    "quiet": "the tool parses sbatch's output",
    "requeue": "stages are always requeueable; slurm.max_requeues bounds it",
    "reservation": "use slurm.reservation",
    "signal": "use slurm.signal_seconds",
    "test-only": "use `hpc-rlhf submit --dry-run`",
    "time": "use slurm.time",
    "usage": "with it sbatch only prints",
    "verbose": "the tool parses sbatch's output",
    "version": "with it sbatch only prints",
    "wait": "the tool parses sbatch's output",
    "wrap": "the tool writes the script",
}

# The same for `slurm.heal.extra`.
_FREE = ("cpus-per-task", "exclusive", "container")
_FIELDS = (
    "account", "constraint", "exclude", "gres", "licenses", "mem", "nodelist", "partition", "qos", "reservation",
    "time",
)  # fmt: skip
OWNED_OF_SENTINELS = {
    **{name: instead for name, instead in _OWNED.items() if name not in _FREE},
    **{name: f"use slurm.heal.{name}" for name in _FIELDS},
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task"), "use slurm.heal.gres"),
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-gpu", "ntasks-per-node"), "a sentinel is one task"),
    **dict.fromkeys(("mail-type", "mail-user"), "use notify.mail"),
    **dict.fromkeys(("export", "export-file"), "use slurm.heal.setup"),
    **dict.fromkeys(("requeue", "no-requeue"), "a sentinel that is preempted starts again"),
    "array": "a sentinel is one job",
    "comment": "it identifies the sentinel",
    "dependency": "a sentinel waits for its stage's job",
    "input": "a sentinel reads no input",
    "kill-on-invalid-dep": "a sentinel is removed when its stage has succeeded",
    "no-kill": "a sentinel runs on one node",
    "nodefile": "use slurm.heal.nodelist",
    "signal": "a sentinel needs none",
}


def refuse_owned(option: str, owned: Mapping[str, str] = _OWNED) -> str:
    """A long sbatch option that may be passed through.

    Args:
        owned: the options that may not be, and what to do instead.

    Raises:
        ValueError: it is not a long option, or the tool owns it; the message says what to do instead.
    """
    if not re.fullmatch("[a-z][a-z0-9]*(-[a-z0-9]+)*", option) or len(option) == 1:
        raise ValueError("give the long name of an sbatch option (no dashes), such as `switches`")
    for name, instead in owned.items():
        if name.startswith(option):  # sbatch accepts abbreviated options
            raise ValueError(f"hpc-rlhf owns sbatch's --{name}: {instead}")
    return option
