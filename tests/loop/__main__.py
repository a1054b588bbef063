"""The loop of docs/feedback.md on the demo, in a new folder: ``python -m tests.loop FOLDER`` prints its figures."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.loop.loop import hpc_rlhf, like, next_round

JOB = Path(__file__).parents[2] / "jobs/tiny.yaml"

folder = Path(sys.argv[1]).absolute()
print(hpc_rlhf("run", JOB, "--set", f"run_dir={folder / 'tiny'}"))
for models, kind, stage in ((["ppo", "ppo"], "pairs", "ppo"), (["ppo"], "thumbs", "kto")):
    run = next_round(folder / "tiny", folder / kind, models)
    print(hpc_rlhf("feedback", run.path.with_name("tiny")))
    print(hpc_rlhf("compare", run.path.with_name("tiny"), run.path))
    share = like(run, stage)
    print(f"{kind}: {stage} wins {share.estimate:.0%} ({share.low:.0%} to {share.high:.0%}) by the voters' taste\n")
