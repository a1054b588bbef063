"""`python -m hpc_rlhf.cli` is the hpc-rlhf command."""

from __future__ import annotations

import sys

from hpc_rlhf.cli import main

sys.exit(main())
