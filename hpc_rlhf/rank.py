"""A rank's first and last steps: hold back the signals until the stage can act on them, hand over to submitit, and end.

Without the first, a job preempted in the second in which Python and submitit load would die of the signal, be recorded
as failed, and take the stages after it along. Held back, the signal is heard as soon as the stage listens.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

HELD_BACK = (signal.SIGTERM, signal.SIGUSR2)


def end_after(main: Callable[[], object]) -> NoReturn:
    """Do a rank's work, and end the process at once with the exit code of that.

    As Python winds down, a thread of gloo, NCCL or Arrow that is still there may abort the process. A rank that had
    saved, or had told what is wrong, would count as crashed.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    from submitit.core.submission import submitit_main

    end_after(submitit_main)
