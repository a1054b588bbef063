"""A lock that lets one launcher at a time work on a run directory, on any file system that machines share.

The lock is a file that names its owner, created by ``link``, which is atomic where ``flock`` may not be
(NFS). A lock is stale, and taken over, when its owner is a process of this machine that has ended, or when it
belongs to another machine and has not been touched for `SILENCE`. A thread of the owner touches it, so the
owner may work as long as it likes.

Not flufl.lock: it waits out the lifetime of a dead owner's lock, takes a reused process id for the owner,
compares the clocks of two machines, and needs Python 3.11.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError

# Twice the time for which NFS may show a file's old state, and a failed touch or two.
SILENCE = 180.0
_TOUCH_EVERY = 20.0
_ATTEMPTS = 5
_AGAIN = 0.5


@contextmanager
def hold(path: Path, doing: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock at ``path`` for as long as the block runs.

    Args:
        doing: what the owner does, for the message to others, such as ``hpc-rlhf submit``.
        patience: seconds to wait for another holder.

    Raises:
        HpcRlhfError: another process holds it.
    """
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "doing": doing}
    text = json.dumps({**owner, "token": uuid.uuid4().hex})
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    deadline = time.monotonic() + patience
    try:
        while True:
            draft.write_text(text)  # its modification time is compared with the lock's
            try:
                _acquire(path, draft)
                break
            except HpcRlhfError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_AGAIN)
    finally:
        draft.unlink()
    done = threading.Event()
    toucher = threading.Thread(target=_touch_until, args=(done, path, text), daemon=True)
    toucher.start()
    try:
        yield
    finally:
        done.set()
        toucher.join()
        with suppress(OSError):
            if path.read_text() == text:
                path.unlink()


def _touch_until(done: threading.Event, path: Path, text: str) -> None:
    """Show other machines that the owner is alive, while the lock belongs to the owner."""
    while not done.wait(_TOUCH_EVERY):
        with suppress(OSError):
            if path.read_text() == text:
                os.utime(path)


def _acquire(path: Path, draft: Path) -> None:
    for _ in range(_ATTEMPTS):
        try:
            os.link(draft, path)
            return
        except FileExistsError:
            pass
        try:
            # The draft was just written, so its time is the file server's current time, whatever our clock shows.
            content, silence = path.read_text(), draft.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            continue
        if not _is_stale(content, silence):
            raise _refusal(path, content)
        _set_aside(path, content)
    raise HpcRlhfError("the lock changes owners too fast", where=str(path), hint="try again", exit_code=RUN_FAILED)


def _set_aside(path: Path, stale: str) -> None:
    """Remove a stale lock; if a new lock was taken in the meantime, it is put back."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if aside.read_text() != stale:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _is_stale(content: str, silence: float) -> bool:
    owner = _owner(content)
    if owner.get("host") != socket.gethostname():
        return silence > SILENCE
    born = _born(int(owner["pid"]))
    return born is None or born != owner.get("born")


def _owner(content: str) -> dict[str, Any]:
    try:
        owner = json.loads(content)
        return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else {}
    except ValueError:
        return {}


def _born(pid: int) -> str | None:
    """When a process of this machine started, to tell it from a later one with its id; None if ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except FileNotFoundError:
        pass
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _refusal(path: Path, content: str) -> HpcRlhfError:
    owner = _owner(content)
    who = f"`{owner['doing']}` (process {owner['pid']} on {owner['host']})" if owner else "another process"
    return HpcRlhfError(
        f"{who} is working on this run directory",
        where=str(path.parent),
        hint=f"wait until it ends; if that machine is gone for good, remove {path}",
        exit_code=RUN_FAILED,
    )
