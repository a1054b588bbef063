"""`python -m hpc_rlhf` is the hpc-rlhf command."""

from __future__ import annotations

import sys

from hpc_rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
