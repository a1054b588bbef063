"""Whether only this user and root can change a file that could run code as this user.

The rules are those of sshd's StrictModes, for the owners and modes of the file and of every folder and link that leads
to it.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from hpc_rlhf.errors import HpcRlhfError

_MOST_LINKS = 40  # Linux follows no more


def check(paths: Iterable[Path], hint: str, group_may_write: bool = False, checked: bool = False) -> None:
    """Check files and folders, and everything that leads to them.

    Args:
        hint: what to do about one of another user.
        group_may_write: whether a group of this user's may write to the folders that lead to them, and own them.
        checked: whether that was checked before, outside the container that this may be. In a user namespace such as
            Apptainer's, root may have no number; what leads to a file and is nobody's there is then accepted.

    Raises:
        HpcRlhfError: somebody else could change one.
    """
    for path in paths:
        *above, last = leading_to(path)
        for each in above:
            if checked and _is_unmapped(each):
                continue
            shared = group_may_write and _is_of_own_group(each)
            check_one(each, hint, shared, shared)
        check_one(last, hint)


def check_one(path: Path, hint: str, group_may_write: bool = False, member_may_own: bool = False) -> None:
    """Check a file, folder or link by itself. One that does not exist is accepted.

    Args:
        hint: as ``check`` takes it.
        group_may_write: whether its mode may let a group write.
        member_may_own: whether it may be another member's of its group.

    Raises:
        HpcRlhfError: somebody else could change it.
    """
    try:
        facts = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    check_facts(path, facts, hint, group_may_write, member_may_own)


def check_facts(
    path: Path, facts: os.stat_result, hint: str, group_may_write: bool = False, member_may_own: bool = False
) -> None:
    """``check_one`` with the lstat of the path, or the fstat of the file that was opened there."""
    if facts.st_uid not in (0, os.geteuid()) and not (member_may_own and _is_member(facts.st_uid, facts.st_gid)):
        what = f"it belongs to another user (uid {facts.st_uid}), and what is in it could run as you"
        if stat.S_ISDIR(facts.st_mode) and _is_member(facts.st_uid, facts.st_gid) and facts.st_gid in os.getgroups():
            hint = f"{hint}; above a run_dir, share: group allows it"
        raise HpcRlhfError(what, where=str(path), hint=hint)
    is_folder = stat.S_ISDIR(facts.st_mode)
    if not (is_folder or stat.S_ISREG(facts.st_mode)):
        return  # the mode of a link or a pipe means nothing
    if is_folder and facts.st_mode & stat.S_ISVTX:
        return  # others can add files, but replace none of ours
    if facts.st_mode & stat.S_IWOTH:
        raise _writable(path, facts, "world-writable, and what others put there", f"chmod o-w {path}", hint)
    if facts.st_mode & stat.S_IWGRP and not group_may_write and not _is_own_group(facts.st_gid):
        what = f"writable by the group {_group_name(facts.st_gid)}, and what its members put there"
        raise _writable(path, facts, what, f"chmod g-w {path}; above a run_dir, share: group allows it", hint)


def leading_to(path: Path) -> Iterator[Path]:
    """Every folder and link that the kernel passes on its way to a path, none of which need exist; last, what it leads
    to."""
    start, names = Path.cwd(), list(path.parts)
    while names and names[0] == "..":  # from the working directory, which no name is looked up for
        start, names = start.parent, names[1:]
    here, todo, links = Path("/"), [*reversed((start / Path(*names)).parts[1:])], 0
    yield here
    while todo:
        part = todo.pop()
        here = here.parent if part == ".." else here / part
        yield here
        if here.is_symlink():
            if (links := links + 1) > _MOST_LINKS:
                return
            target = Path(os.readlink(here))
            todo += reversed(target.parts[target.is_absolute() :])
            here = Path("/") if target.is_absolute() else here.parent


def _writable(path: Path, facts: os.stat_result, what: str, cure: str, hint: str) -> HpcRlhfError:
    if os.geteuid() in (0, facts.st_uid):
        look = "that everything in it is yours" if stat.S_ISDIR(facts.st_mode) else "what is in it"
        hint = f"check {look}, then: {cure}"
    else:
        hint = f"{hint}, or ask its owner for: {cure}"
    return HpcRlhfError(f"it is {what} could run as you", where=str(path), hint=hint)


def _is_unmapped(path: Path) -> bool:
    """Whether the owner of a folder or link has no number in this user namespace, and this user cannot replace it."""
    if not path.exists() or path.lstat().st_uid != _overflow_user():
        return False
    folder = path.parent if path.is_symlink() else path
    return bool(folder.stat().st_mode & stat.S_ISVTX) or not os.access(folder, os.W_OK)


@cache
def _overflow_user() -> int | None:
    """The number that stands for users without one in this user namespace; None if it is a user's own."""
    try:
        unknown = int(Path("/proc/sys/kernel/overflowuid").read_text())
        ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except (OSError, ValueError):
        return None
    return None if any(first <= unknown < first + count for first, _, count in ranges) else unknown


@cache
def _is_own_group(gid: int) -> bool:
    """Whether a group is root's, or this user's alone: many systems make a group for each user, named like the user."""
    if gid == 0:
        return True
    try:
        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    if gid != me.pw_gid or group.gr_name != me.pw_name:
        return False
    return set(group.gr_mem) <= {me.pw_name} and all(u.pw_uid == me.pw_uid for u in pwd.getpwall() if u.pw_gid == gid)


def _is_of_own_group(path: Path) -> bool:
    return path.exists() and path.stat().st_gid in os.getgroups()


def _is_member(uid: int, gid: int) -> bool:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return False
    return gid in os.getgrouplist(user.pw_name, user.pw_gid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
