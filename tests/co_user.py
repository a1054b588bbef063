"""Another user of the same machine, who does what the kernel allows."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import pytest

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def as_co_user(act: Callable[[], object], user: int = NOBODY) -> bool:
    """Act in a process of that user, or of one with another number. Returns whether it succeeded."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    code = 1
    try:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
