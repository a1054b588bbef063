"""What Slurm's controller tells of the site: its settings, partitions and nodes, and whether it would take a script."""

from __future__ import annotations

from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.slurm import commands


def configuration() -> dict[str, str]:
    """The cluster's settings as its controller has them; under "" the line that tells when, by the controller's clock.

    Raises:
        HpcRlhfError: the controller gives no answer.
    """
    lines = commands.run(["scontrol", "show", "config"]).splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {"": lines[0] if lines else "", **{name.strip(): value.strip() for name, _, value in pairs}}


def partitions() -> dict[str, dict[str, str]]:
    """What ``scontrol show partition`` knows of each, by name.

    Raises:
        HpcRlhfError: the controller gives no answer.
    """
    records = _records(commands.run(["scontrol", "--oneliner", "show", "partition"]))
    return {record["PartitionName"]: record for record in records if "PartitionName" in record}


def nodes() -> list[dict[str, str]]:
    """What ``scontrol show node`` knows of each.

    Raises:
        HpcRlhfError: the controller gives no answer.
    """
    return _records(commands.run(["scontrol", "--oneliner", "show", "node"]))


def accounting_problem() -> str | None:
    """Why sacct does not answer; None where it does."""
    try:
        commands.run(["sacct", "--noheader", "--jobs=1"])
    except HpcRlhfError as error:
        return error.message
    return None


def test(script: Path) -> None:
    """Let sbatch judge a script without submitting it.

    Raises:
        HpcRlhfError: it would be refused; the message is sbatch's.
    """
    commands.run(["sbatch", "--test-only", str(script)])


def _records(text: str) -> list[dict[str, str]]:
    """Lines of NAME=VALUE words, each as a mapping; of a name that comes twice, the first."""
    records = []
    for line in text.splitlines():
        fields: dict[str, str] = {}
        for word in line.split():
            name, equals, value = word.partition("=")
            if equals:
                fields.setdefault(name, value)
        records.append(fields)
    return records
