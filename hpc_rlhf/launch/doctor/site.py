"""What Slurm's controller reports: settings, partitions and nodes, and whether it would accept a script."""

from __future__ import annotations

from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.slurm import commands


def configuration() -> dict[str, str]:
    """The cluster's settings; under "" the first line, which has the time of the controller's clock.

    Raises:
        HpcRlhfError: the controller does not respond.
    """
    lines = commands.run(["scontrol", "show", "config"]).splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {"": lines[0] if lines else "", **{name.strip(): value.strip() for name, _, value in pairs}}


def partitions() -> dict[str, dict[str, str]]:
    """The fields of ``scontrol show partition``, by partition.

    Raises:
        HpcRlhfError: the controller does not respond.
    """
    records = _records(commands.run(["scontrol", "--oneliner", "show", "partition"]))
    return {record["PartitionName"]: record for record in records if "PartitionName" in record}


def nodes() -> list[dict[str, str]]:
    """The fields of ``scontrol show node``, for each node.

    Raises:
        HpcRlhfError: the controller does not respond.
    """
    return _records(commands.run(["scontrol", "--oneliner", "show", "node"]))


def accounting_problem() -> str | None:
    """Why sacct fails; None if it works."""
    try:
        commands.run(["sacct", "--noheader", "--jobs=1"])
    except HpcRlhfError as error:
        return error.message
    return None


def test(script: Path) -> None:
    """Let sbatch check a script without submitting it.

    Raises:
        HpcRlhfError: it would be rejected; the message is sbatch's.
    """
    commands.run(["sbatch", "--test-only", str(script)])


def _records(text: str) -> list[dict[str, str]]:
    """Lines of NAME=VALUE words, each as a mapping; the first of repeated names counts."""
    records = []
    for line in text.splitlines():
        fields: dict[str, str] = {}
        for word in line.split():
            name, equals, value = word.partition("=")
            if equals:
                fields.setdefault(name, value)
        records.append(fields)
    return records
