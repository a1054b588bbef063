"""Running on a hostfile's machines with DeepSpeed's launcher."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.local.hostfile import read_hostfile
from tests.launch.fakes import Here, is_alive, wait_for

pytestmark = pytest.mark.slow

HOSTFILES = Path(__file__).parents[2] / "hostfiles"
# Takes this machine for any other: runs the command here, says so, and like the real one is gone at the end of the
# connection while what it started is not.
SSH = """\
#!/bin/bash
while [[ $1 == -o ]]; do shift 2; done
host=$1; shift
echo "$host: $*" >> "$SSH_LOG"
exec bash -c "$*"
"""


@pytest.fixture
def two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(SSH)
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "ssh.log"))
    monkeypatch.setenv("NCCL_DEBUG", "a b; $(touch trap)")
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "two").write_text("lab1 slots=1\n# the second\nlab2 slots=1\n")
    return Here.new(tmp_path)


def test_ranks_start_on_every_machine(two_machines: Here) -> None:
    code, _, err = two_machines.finish("run", "job.yaml", "--hostfile", "two", FAKE_REWARD="late_user_error")
    assert code == 2, err
    assert "error: reward: data.json: no such file" in err
    seen = [two_machines.seen("sft", rank) for rank in range(2)]
    assert [(env["RANK"], env["WORLD_SIZE"], env["CROSS_RANK"]) for env in seen] == [("0", "2", "0"), ("1", "2", "1")]
    assert len({(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in seen}) == 1
    assert {env["NCCL_DEBUG"] for env in seen} == {"a b; $(touch trap)"}
    assert {env["CUDA_VISIBLE_DEVICES"] for env in seen if "CUDA_VISIBLE_DEVICES" in env} <= {"0"}
    calls = (two_machines.folder / "ssh.log").read_text()
    # Of each of the two stages: one asks for the address, and one for each machine starts its ranks.
    assert sorted(line.partition(":")[0] for line in calls.splitlines()) == ["lab1"] * 4 + ["lab2"] * 2
    assert "secret" not in calls
    assert not (two_machines.folder / "trap").exists()


def test_every_machine_saves_on_a_stop_request(two_machines: Here) -> None:
    process = two_machines.start("run", "job.yaml", "--hostfile", "two", FAKE_SFT="until_signal")
    ranks = two_machines.await_ranks()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "sft is saved at step 7" in err
    assert "resume with: hpc-rlhf run job.yaml --hostfile two" in err
    wait_for(lambda: not any(map(is_alive, ranks)))


def test_machines_save_and_exit_when_the_launcher_is_killed(two_machines: Here) -> None:
    process = two_machines.start("run", "job.yaml", "--hostfile", "two", FAKE_SFT="until_signal")
    ranks = two_machines.await_ranks()
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(is_alive, ranks)))
    assert two_machines.events("interrupted") == [("interrupted", "sft")]


def test_slots_must_equal_the_ranks_of_every_stage(two_machines: Here) -> None:
    (two_machines.folder / "three").write_text("localhost slots=3")
    code, _, err = two_machines.finish("run", "job.yaml", "--hostfile", "three")
    assert code == 2
    assert "the hostfile has 3 slots, but sft runs on 2 ranks (1 nodes x 2)" in err
    assert two_machines.events("started") == []


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", "", "names no machine"),
        ("# none\n", "", "names no machine"),
        ("lab1\n", ":1", "cannot read 'lab1'"),
        ("lab1 slots=2\n\nlab2 slots=two\n", ":3", "cannot read"),
        ("lab1 slots=0\n", ":1", "cannot read"),
        ("lab1 slots=2 max_slots=4\n", ":1", "cannot read"),
        ("-oProxyCommand=touch slots=2\n", ":1", "cannot read"),
        ("lab1;reboot slots=2\n", ":1", "cannot read"),
        ("lab1 slots=2\nlab1 slots=2\n", ":2", "named twice"),
    ],
)
def test_a_bad_hostfile_is_reported_with_its_line(tmp_path: Path, text: str, place: str, what: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(HpcRlhfError, match=what) as caught:
        read_hostfile(path)
    assert caught.value.where == f"{path}{place}"


def test_a_binary_hostfile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("binary", "missing", "."):
        with pytest.raises(HpcRlhfError, match="cannot read the hostfile"):
            read_hostfile(tmp_path / name)


def test_our_hostfiles_parse_as_in_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    for path in HOSTFILES.glob("*.hostfile"):
        assert read_hostfile(path).slots == dict(fetch_hostfile(str(path)))
