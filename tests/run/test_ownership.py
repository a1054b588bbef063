"""A run directory that another user could change is refused before anything in it is used; ranks load no pickle."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc_rlhf import trust
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch import prepare
from hpc_rlhf.launch.prepare import claim
from hpc_rlhf.run import ownership
from hpc_rlhf.run.layout import RunDir
from tests.co_user import NOBODY, as_co_user, as_root
from tests.launch.specs import make_spec

PICKLE = "stages/sft/logs/7_submitted.pkl"
FILES = [
    PICKLE,
    "stages/sft/checkpoints/step-00000001/optim.pt",
    "scripts/sft.sbatch",
    "job.yaml",
    "stages/sft/hostfile",
]


class Planted:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.left), "w")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "home/me/run")
    for file in FILES:
        (run.path / file).parent.mkdir(parents=True, exist_ok=True)
        (run.path / file).touch()
    run.path.chmod(0o700)
    (run.path / PICKLE).write_bytes(pickle.dumps(Planted(tmp_path / "left")))
    return run


def refused(run: RunDir, why: str, where: Path) -> None:
    for stage in (None, "sft"):
        with pytest.raises(HpcRlhfError, match=why) as error:
            ownership.check(run, stage)
        assert error.value.where == str(where)
        assert error.value.exit_code == 2


def test_own_and_missing_folders_are_accepted(run: RunDir) -> None:
    ownership.check(run)
    ownership.check(run, "sft")
    ownership.check(RunDir(run.path / "no such"))
    ownership.check(RunDir(run.path / "no such"), "sft")


@pytest.mark.parametrize("path", [".", "scripts", "stages/sft/logs", "stages/sft/checkpoints/step-00000001", *FILES])
def test_what_everyone_may_write_is_refused(run: RunDir, path: str) -> None:
    (run.path / path).chmod(0o777)
    refused(run, "it is world-writable", run.path / path)


@as_root
@pytest.mark.parametrize("path", [".", "scripts", *FILES])
def test_what_another_user_owns_is_refused(run: RunDir, path: str) -> None:
    os.chown(run.path / path, NOBODY, -1)
    refused(run, "it belongs to another user", run.path / path)


@as_root
@pytest.mark.parametrize("path", [".", "scripts", "scripts/sft.sbatch", "stages/sft/logs"])
def test_what_a_group_may_write_is_refused_where_it_can_enter(run: RunDir, path: str) -> None:
    os.chown(run.path / path, -1, NOBODY)
    run.path.chmod(0o750)
    (run.path / path).chmod(0o770)
    refused(run, "it is writable by the group nogroup", run.path / path)
    (run.path / path).chmod(0o750)
    ownership.check(run)


@as_root
@pytest.mark.parametrize(
    ("name", "members", "primary", "accepted"),
    [
        ("me", [], [], True),
        ("me", ["me"], [], True),
        ("me", ["other"], [], False),
        ("me", [], ["other"], False),
        ("users", [], [], False),
    ],
)
@pytest.mark.parametrize("changed", ["folder", "folder/job.yaml"])
def test_the_users_private_group_may_write(
    changed: str, name: str, members: list[str], primary: list[str], accepted: bool,
    public: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a umask of 002, which systems with such groups have."""
    (public / "folder").mkdir()
    (public / "folder/job.yaml").touch()
    for path in ("folder", "folder/job.yaml"):
        os.chown(public / path, 4242, 4242)
    (public / changed).chmod(0o775)
    users = {4242: SimpleNamespace(pw_name="me", pw_uid=4242, pw_gid=4242)}
    others = [SimpleNamespace(pw_name=each, pw_uid=4243, pw_gid=4242) for each in primary]
    group = SimpleNamespace(gr_name=name, gr_mem=members)
    monkeypatch.setattr("pwd.getpwuid", users.__getitem__)
    monkeypatch.setattr("pwd.getpwall", lambda: [*users.values(), *others])
    monkeypatch.setattr("grp.getgrgid", {4242: group}.__getitem__)
    assert as_co_user(lambda: trust.check([public / "folder/job.yaml"], "hint"), 4242) == accepted


@as_root
def test_a_hint_is_what_this_user_can_do(public: Path) -> None:
    public.chmod(0o777)

    def hint() -> None:
        with pytest.raises(HpcRlhfError) as error:
            trust.check([public / "run"], "choose your own run_dir")
        assert error.value.hint == f"choose your own run_dir, or ask its owner for: chmod o-w {public}"

    assert as_co_user(hint)
    with pytest.raises(HpcRlhfError, match="then: chmod o-w"):
        trust.check([public / "run"], "choose your own run_dir")


@as_root
def test_files_that_a_generous_umask_made_in_a_closed_folder_are_accepted(run: RunDir) -> None:
    for path in (run.path / "scripts", run.path / "scripts/sft.sbatch"):
        os.chown(path, -1, NOBODY)
        path.chmod(0o775)
    ownership.check(run)


@as_root
@pytest.mark.parametrize(
    ("mode", "owner", "group", "why"),
    [
        (0o777, 0, 0, "it is world-writable"),
        (0o775, 0, NOBODY, "it is writable by the group"),
        (0o755, NOBODY, 0, "it belongs to another user"),
        (0o1777, NOBODY, 0, "it belongs to another user"),
        (0o1777, 0, 0, None),  # as /tmp is
        (0o1775, 0, NOBODY, None),
        (0o755, 0, NOBODY, None),
    ],
)
@pytest.mark.parametrize("folder", ["home", "home/me"])
@pytest.mark.parametrize("exists", [True, False])
def test_every_folder_above_is_checked(
    run: RunDir, tmp_path: Path, folder: str, exists: bool, mode: int, owner: int, group: int, why: str | None
) -> None:
    os.chown(tmp_path / folder, owner, group)
    (tmp_path / folder).chmod(mode)
    run = run if exists else RunDir(run.path.with_name("new"))
    if why is None:
        ownership.check(run)
    else:
        refused(run, why, tmp_path / folder)


@as_root
@pytest.mark.parametrize("link", ["home/me/run/stages/reward", "home/me/run/stages/sft/checkpoints/best", "here"])
def test_links_are_followed(run: RunDir, tmp_path: Path, link: str) -> None:
    """Whoever can write above the target of a link can change what it leads to, and so can who owns the link."""
    (tmp_path / "open/other").mkdir(parents=True)
    (tmp_path / link).symlink_to(tmp_path / "open/other")
    run = RunDir(tmp_path / "here/new") if link == "here" else run
    ownership.check(run)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(HpcRlhfError, match="it is world-writable") as error:
        ownership.check(run)
    assert error.value.where == str(tmp_path / "open")
    (tmp_path / "open").chmod(0o755)
    os.chown(tmp_path / link, NOBODY, -1, follow_symlinks=False)
    with pytest.raises(HpcRlhfError, match="it belongs to another user"):
        ownership.check(run)


@pytest.mark.parametrize("way", ["..", "link/.."])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_before_dots_are_followed(
    way: str, absolute: bool, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What .. means is up to who can replace the link before it."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open/here").symlink_to(run.path)
    (run.path / "link").symlink_to(tmp_path / "home")
    start = tmp_path if absolute else Path()
    monkeypatch.chdir(tmp_path)
    file = start / "open/here" / way / ("run" if way == ".." else "home/me/run") / "job.yaml"
    assert file.exists()
    trust.check([file], "hint")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(HpcRlhfError, match="it is world-writable") as error:
        trust.check([file], "hint")
    assert error.value.where == str(tmp_path / "open")


@as_root
def test_a_working_directory_of_another_user_leads_to_no_file_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    monkeypatch.chdir(tmp_path / "theirs")
    trust.check([Path("../job.yaml")], "hint")
    with pytest.raises(HpcRlhfError, match="it belongs to another user"):
        trust.check([Path("job.yaml")], "hint")


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    trust.check([tmp_path / "one/file"], "hint")


@as_root
def test_in_a_container_where_root_has_no_number_ranks_accept_what_leads_to_a_run(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only there, and only what the user cannot write to. Root's files are then those of the overflow user."""
    user = 4242
    run = RunDir(public / "home/run")
    run.scripts.mkdir(parents=True)
    (run.scripts / "sft.sbatch").touch()
    for path in (run.path, *run.path.rglob("*")):
        os.chown(path, user, user)
    os.chown(public / "home", NOBODY, NOBODY)
    read_text = Path.read_text
    files = {"/proc/sys/kernel/overflowuid": str(NOBODY), "/proc/self/uid_map": "4242 4242 1\n"}
    monkeypatch.setattr(Path, "read_text", lambda path, **how: files.get(str(path)) or read_text(path, **how))
    trust._overflow_user.cache_clear()
    ways: dict[str, Callable[[], object]] = {
        "rank": lambda: ownership.check(run, "sft"), "launcher": lambda: ownership.check(run)
    }  # fmt: skip

    def accept() -> list[str]:
        return [name for name, way in ways.items() if as_co_user(way, user)]

    assert accept() == ["rank"]
    (public / "home").chmod(0o1777)  # as /scratch may be
    assert accept() == ["rank"]
    (public / "home").chmod(0o777)
    assert accept() == []
    (public / "home").chmod(0o755)
    for path in (run.scripts / "sft.sbatch", run.scripts, run.path):
        os.chown(path, NOBODY, NOBODY)
        assert accept() == []
        os.chown(path, user, user)
    files["/proc/self/uid_map"] = "0 0 4294967295\n"
    assert accept() == []
    trust._overflow_user.cache_clear()


def test_launchers_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(HpcRlhfError, match="world-writable"), claim(make_spec(tmp_path / "run"), "test"):
        pass


@pytest.mark.parametrize("name", ["run", "new/run"])
def test_launchers_refuse_one_that_others_could_make_first(name: str, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(HpcRlhfError, match="world-writable"), claim(make_spec(tmp_path / "open" / name), "test"):
        pass
    assert not list((tmp_path / "open").iterdir())


@as_root
def test_launchers_check_the_folder_that_they_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the sticky bit, another user may have been faster."""

    def make_first(folder: Path, mode: int) -> None:
        folder.mkdir(mode)
        os.chown(folder, NOBODY, NOBODY)

    tmp_path.chmod(0o1777)
    monkeypatch.setattr(prepare, "make_folder", make_first)
    with pytest.raises(HpcRlhfError, match="belongs to"), claim(make_spec(tmp_path / "run"), "test"):
        pass


@pytest.mark.parametrize("umask", [0o002, 0o007, 0])
def test_what_launchers_make_is_accepted_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with claim(make_spec(tmp_path / "new/folder/run"), "test") as run:
            ownership.check(RunDir(run.path.with_name("other")))
    finally:
        os.umask(before)
    assert not (tmp_path / "new").stat().st_mode & 0o022


@pytest.mark.parametrize("entry", ["rank", "task"])
def test_a_rank_refuses_it_and_never_loads_a_pickle(run: RunDir, tmp_path: Path, entry: str) -> None:
    logs = run.stage("sft").logs
    args = [str(logs)] if entry == "rank" else [str(run.path), "sft"]
    slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "RANK": "0"}
    environment = {**os.environ, **slurm, "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}

    def start() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"hpc_rlhf.{entry}", *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    (run.path / "job.yaml").write_text("not: a spec\n")
    started = start()  # it is the spec that is wrong
    assert "job.yaml" in started.stderr + "".join(log.read_text() for log in logs.glob("*.err"))
    logs.chmod(0o777)
    done = start()
    assert done.returncode == 2
    assert done.stderr.startswith(f"hpc-rlhf: {logs}: it is world-writable")
    assert not (tmp_path / "left").exists()


@as_root
@pytest.mark.parametrize("group", [0, NOBODY])
def test_a_shared_run_may_lie_in_a_folder_of_the_group(
    run: RunDir, tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getgroups", lambda: [group])
    os.chown(tmp_path / "home", 0, NOBODY)
    (tmp_path / "home").chmod(0o2770)
    with pytest.raises(HpcRlhfError, match="writable by the group"):
        ownership.check(run)
    (run.path / "job.yaml").write_text("name: x\nshare: group\n")
    if group == NOBODY:
        ownership.check(run)
        ownership.check(run, "sft")
        ownership.check(RunDir(run.path.with_name("new")), shared=True)
        (run.path / "scripts").chmod(0o2770)
        os.chown(run.path / "scripts", 0, NOBODY)
        run.path.chmod(0o750)  # into the run itself only its owner may write
    with pytest.raises(HpcRlhfError, match="writable by the group"):
        ownership.check(run)


@as_root
@pytest.mark.parametrize(("owner", "is_member"), [(NOBODY, True), (1, False), (4_000_000, False)])
def test_a_member_of_the_group_may_own_the_folder_above_a_shared_run(
    run: RunDir, tmp_path: Path, owner: int, is_member: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the head of a group the folder of a project."""
    monkeypatch.setattr(os, "getgroups", lambda: [NOBODY])
    os.chown(tmp_path / "home", owner, NOBODY)
    with pytest.raises(HpcRlhfError, match="it belongs to another user") as refusal:
        ownership.check(run)
    assert ("share: group" in str(refusal.value.hint)) == is_member
    (run.path / "job.yaml").write_text("name: x\nshare: group\n")
    if is_member:
        ownership.check(run)
        os.chown(run.path / "job.yaml", owner, NOBODY)  # what is in the run is the user's
    with pytest.raises(HpcRlhfError, match="it belongs to another user"):
        ownership.check(run)


@as_root
def test_launchers_check_the_folders_above_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getgroups", lambda: [NOBODY])
    (tmp_path / "project").mkdir()
    os.chown(tmp_path / "project", 0, NOBODY)
    (tmp_path / "project").chmod(0o2770)
    spec = make_spec(tmp_path / "project/run")
    with pytest.raises(HpcRlhfError, match="writable by the group nogroup"), claim(spec, "test"):
        pass
    assert not (tmp_path / "project/run").exists()
    with claim(spec.model_copy(update={"share": "group"}), "test") as run:
        assert run.path.is_dir()
    (tmp_path / "project").chmod(0o2777)
    with pytest.raises(HpcRlhfError, match="world-writable"), claim(spec, "test"):
        pass
