"""A rank's first steps under Slurm: hold back the signals until the stage can act on them, then hand over to submitit.

Without this, a job preempted in the second in which Python and submitit load would die of the signal, be recorded
as failed, and take the stages after it along. Held back, the signal is heard as soon as the stage listens.
"""

from __future__ import annotations

import signal

HELD_BACK = (signal.SIGTERM, signal.SIGUSR2)

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    from submitit.core.submission import submitit_main

    submitit_main()
