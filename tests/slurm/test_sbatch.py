"""Pass-through options of sbatch, and its time limits."""

from __future__ import annotations

import re

import pytest

from hpc_rlhf.slurm.jobs import time_limit
from hpc_rlhf.slurm.sbatch import _OWNED, OWNED_OF_SENTINELS, refuse_owned
from hpc_rlhf.spec.cluster import HealSpec, SlurmSpec
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


@pytest.mark.parametrize("option", ["exclusive", "cpus-per-task", "switches", "mem-per-cpu"])
def test_a_sentinel_may_have_options_that_fit_its_site(option: str) -> None:
    assert refuse_owned(option, OWNED_OF_SENTINELS) == option


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("gres", "use slurm.heal.gres"),
        ("gpus-per-node", "use slurm.heal.gres"),
        ("time", "use slurm.heal.time"),
        ("nodes", "a sentinel is one task"),
        ("mail-user", "use notify.mail"),
        ("dependency", "a sentinel waits for its stage's job"),
    ],
)
def test_the_hint_for_a_sentinels_option_applies_to_the_sentinel(option: str, instead: str) -> None:
    with pytest.raises(ValueError, match=instead):
        refuse_owned(option, OWNED_OF_SENTINELS)


@pytest.mark.parametrize("owned", [_OWNED, OWNED_OF_SENTINELS])
def test_owned_options_name_real_fields(owned: dict[str, str]) -> None:
    for instead in owned.values():
        for field in re.findall(r"slurm\.heal\.(\w+)", instead):
            assert field in HealSpec.model_fields
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
