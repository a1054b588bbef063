"""Pass-through options of sbatch, and its time limits."""

from __future__ import annotations

import re

import pytest

from hpc_rlhf.slurm.jobs import time_limit
from hpc_rlhf.slurm.sbatch import refuse_owned
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.job import JobSpec


@pytest.mark.parametrize("option", ["switches", "mem-per-cpu", "gpu-bind", "nice", "begin", "wckey", "x11"])
def test_free_option_passes(option: str) -> None:
    assert refuse_owned(option) == option


@pytest.mark.parametrize(
    "option",
    [
        "job-name",
        "output",
        "error",
        "dependency",
        "nodes",
        "ntasks",
        "time",
        "partition",
        "requeue",
        "open-mode",
        "signal",
        "comment",
        "gres",
        "gpus",
        "wrap",
        "array",
        "depend",
        "part",
        "J",
        "n",
        "",
        "-x",
        "--x",
        "a b",
        "a=b",
        "a\n",
        "Nodes",
        "ünits",
    ],
)
def test_owned_or_malformed_option_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=r"hpc-rlhf owns sbatch's --|give the long name"):
        refuse_owned(option)


def test_owned_options_name_real_fields() -> None:
    from hpc_rlhf.slurm.sbatch import _OWNED

    for instead in _OWNED.values():
        for field in re.findall(r"slurm\.(\w+)", instead):
            assert field in SlurmSpec.model_fields
    assert "name" in JobSpec.model_fields


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("12:00:00", 43200),
        ("2-1", 176400),
        ("1-0:30", 88200),
        ("1-00:00:01", 86401),
        ("0", None),
    ],
)
def test_time_limit(text: str, seconds: int | None) -> None:
    assert SlurmSpec(time=text, signal_seconds=10).time == text
    assert time_limit(text) == seconds
