"""Another user of the same machine, who does what the kernel allows."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import pytest

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def as_co_user(act: Callable[[], object], user: int = NOBODY) -> bool:
    """Act in a process of that user, or of one with another number. Returns whether it succeeded."""

    def succeed() -> int:
        act()
        return 0

    return exit_code_as_co_user(succeed, user) == 0


def exit_code_as_co_user(main: Callable[[], int], user: int = NOBODY) -> int:
    """The exit code of a command in a process of that user; 1 if it raises."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        code = main()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
