"""What a sweep's folder records is read with suspicion."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpc_rlhf.cli import main
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.sweep_order import followers, jobs_before
from hpc_rlhf.run.layout import SweepDir
from tests.co_user import NOBODY, as_root


def record(folder: Path, *names: object, limit: object = None) -> SweepDir:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"runs": names, "limit": limit}))
    return SweepDir(folder)


def test_names_and_limit_are_read(tmp_path: Path) -> None:
    names = ["kl_coef=0.02+lr=1e-6", "0.path=a-b_c"]
    assert record(tmp_path / "sweep", *names, limit=2).recorded() == (names, 2)
    assert record(tmp_path / "sweep", *names, limit="x").recorded() == (names, None)
    assert SweepDir(tmp_path).recorded() == ([], None)


@pytest.mark.parametrize(
    "name", ["../other", "/etc", "a/b", "", ".", "..", ".hidden", "a\nb", "\x1b[2J", 7, None, ["a"]]
)
def test_a_name_that_leaves_the_folder_is_refused(
    name: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = record(tmp_path / "sweep", "good=1", name)
    with pytest.raises(HpcRlhfError, match="is not the name of a run of this sweep"):
        sweep.recorded()
    for verb in ("status", "cancel", "heal"):
        assert main([verb, str(sweep.path)]) == 2
        assert "is not the name of a run of this sweep" in capsys.readouterr().err


@as_root
def test_another_users_sweep_orders_none_of_our_jobs(tmp_path: Path) -> None:
    sweep = record(tmp_path / "sweep", "theirs", "mine", limit=1)
    os.chown(sweep.json, NOBODY, NOBODY)
    assert jobs_before(sweep.run("mine")) == ()
    assert followers(sweep.run("theirs")) == []
