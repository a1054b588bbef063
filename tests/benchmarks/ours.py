"""Our side: the stages as ``hpc-rlhf run`` runs them, timed by their metric rows."""

from __future__ import annotations

import json
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train import context
from hpc_rlhf.train.data.arrow import Rows
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.entry import run_stage
from hpc_rlhf.train.metrics import MetricsLog
from tests.benchmarks import workload
from tests.benchmarks.measure import Clock, Result, main
from tests.train.stages import make_run


class _Ticking(MetricsLog):
    """The stage's metrics; each training row stops the clock."""

    clock = Clock()
    last: Mapping[str, float | None] = {}
    answer_tokens: ClassVar[list[float]] = []

    def log(self, step: int, total_steps: int, kind: str, values: Mapping[str, float | None]) -> None:
        super().log(step, total_steps, kind, values)
        if kind == "train":
            self.clock.step()
            type(self).last = values
            self.answer_tokens.append(values.get("answer_tokens") or 0.0)


def _run(options: Namespace) -> RunDir:
    """Run a stage in this process on prepared tokens, as the peers do."""
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    context.MetricsLog = _Ticking  # type: ignore[misc]
    run, ready = RunDir(options.run / "run"), options.run / "ready"
    if os.environ.get("RANK", "0") == "0":
        _make(run, options)
        ready.touch()
    while not ready.exists():
        time.sleep(0.1)
    run_stage(str(run.path), options.task)
    return run


def _make(run: RunDir, options: Namespace) -> None:
    """Prepare a run with the tokens of the workload."""
    fields = workload.job(options.work, run.path, options.task, options.samples, options.steps, options.ranks)
    make_run(JobSpec.model_validate(fields))
    made = RunDir(workload.tokens(options.work, options.task)).stage(options.task).data
    shutil.copytree(made, run.stage(options.task).data)
    if options.task == "ppo":
        _hand_over(options.work / "reward", run.stage("reward").model)


def _hand_over(made: Path, target: Path) -> None:
    """Use a folder with a reward model as the reward stage's model."""
    shutil.copytree(made, target)
    manifest.write(target, {"stage": "reward", "step": 1, "seconds": 0, "metrics": {}})


def _tokens(run: RunDir, options: Namespace) -> int:
    """Real tokens of the timed steps, from the rows that the sampler chose; in GRPO, of the responses alone."""
    if options.task == "grpo":
        return round(options.samples * sum(_Ticking.answer_tokens[options.warm_up :]))
    if options.task == "pretrain":
        return options.samples * (options.steps - options.warm_up) * workload.LONGEST // options.ranks
    (path,) = run.stage(options.task).data.glob("*/train.arrow")
    rows = Rows(path)
    tokens = 0
    for place in range(options.warm_up * options.samples, options.steps * options.samples):
        row = rows[sample_at(place, len(rows), workload.SEED, options.task)]
        answers = [len(row[f"{name}_ids"]) for name in ("chosen", "rejected") if row.get(f"{name}_ids")]
        answers = [workload.ANSWER] if options.task == "ppo" else answers
        tokens += sum(len(row["prompt_ids"]) + answer for answer in answers)
    return tokens


def stage(options: Namespace) -> Result:
    run = _run(options)
    facts = {name: _Ticking.last[name] for name in ("loss", "answer_tokens", "reward") if name in _Ticking.last}
    samples = options.samples * (options.steps - options.warm_up)
    config = json.loads((run.stage(options.task).model / "config.json").read_text())
    tokens = _tokens(run, options)
    return _Ticking.clock.result(options.warm_up, samples, tokens, config["dtype"], **facts)


if __name__ == "__main__":
    main({"pretrain": stage, "sft": stage, "reward": stage, "ppo": stage, "grpo": stage})
