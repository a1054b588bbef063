"""Compares learning on HH data with peers, from the same weights and the same samples in the same order.

Held-out perplexity of SFT beside DeepSpeed-Chat's loop, held-out accuracy of the reward model beside its and TRL's, and
PPO's reward and KL from those two models. All sides train in float32 by the same AdamW and cosine, without dropout and
weight decay, and transformers alone judges what each has made. Peers pad to the longest of a batch, which gives the
same numbers as padding to 512.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train.algorithms import intervals
from hpc_rlhf.train.algorithms.intervals import Interval
from hpc_rlhf.train.data.sampler import sample_at
from tests.benchmarks import learning_peers, workload
from tests.benchmarks.learning_peers import PEERS, SAMPLES, STEPS, Row
from tests.train.stages import make_run, metrics

EVERY = 20
# Share of the prompts. An accuracy needs far more pairs than a perplexity needs texts.
HELD_OUT = {"sft": 0.05, "reward": 0.5, "ppo": 0.25}
PPO = {
    "actor_lr": 1e-4, "critic_lr": 3e-4, "warmup": 10, "global_batch": 16, "micro_batch": 8, "max_steps": 80,
    "epochs": 10, "kl_coef": 0.05, "normalize_scores": True, "precision": "fp32",
}  # fmt: skip
PPO_SHOWN = (
    "reward", "reward_std", "kl", "entropy", "answer_tokens", "eos_rate", "explained_variance", "clipfrac",
)  # fmt: skip


def job(work: Path, stage: str, seed: int, lr: float) -> dict[str, Any]:
    """Our job spec for a stage. PPO's also names the two stages before it, whose models are copied in."""
    trained = {
        "micro_batch": SAMPLES, "precision": "fp32", "max_steps": STEPS, "epochs": 100, "lr": lr,
        "checkpoint_every": STEPS, "warmup": 0,
    }  # fmt: skip
    if stage == "sft":
        trained["answer_only"] = False  # as its peer trains
    longest = workload.LONGEST // 2
    model: Any = {"from_scratch": workload.SHAPES["4 x 256"]}
    stages: dict[str, Any] = {stage: trained}
    if stage == "ppo":
        longest, model = workload.PROMPT, str(work / "sft" / "stages/sft/model")
        stages = {"sft": trained, "reward": trained, "ppo": PPO, "eval": {}}
    return {
        "name": "learning", "run_dir": str(work / stage), "seed": seed,
        "slurm": {"gpus_per_node": 0, "ranks_per_node": 1},
        "data": {
            "sources": [workload.source(work)], "held_out": HELD_OUT[stage],
            "split": {"sft": 1, "reward": 1, "ppo": 8},
            "max_prompt_tokens": longest, "max_answer_tokens": longest,
        },
        "models": {"actor": model},
        "stages": stages,
    }  # fmt: skip


def ours(work: Path, stage: str, seed: int, lr: float) -> RunDir:
    """Run our side unless it has already finished."""
    spec = job(work, stage, seed, lr)
    run = RunDir(work / stage)
    if not run.path.exists():
        run = make_run(JobSpec.model_validate(spec))
        for made in ("sft", "reward") if stage == "ppo" else ():
            shutil.copytree(RunDir(work / made).stage(made).model, run.stage(made).model)
    file = work / f"{stage}.json"
    file.write_text(json.dumps(spec))
    with (work / f"{stage}.log").open("a") as log:
        command = [str(Path(sys.executable).with_name("hpc-rlhf")), "run", str(file)]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return run


def rows(run: RunDir, stage: str, part: str) -> Any:
    """The samples that our stage trained on or held out."""
    import datasets

    (path,) = run.stage(stage).data.glob(f"*/{part}.arrow")
    return datasets.Dataset.from_file(str(path))


def ordered(run: RunDir, stage: str, seed: int) -> list[Row]:
    """The samples of all steps in the order our stage took them."""
    train = rows(run, stage, "train")
    return [train[sample_at(place, len(train), seed, stage)] for place in range(SAMPLES * STEPS)]


def _span(interval: Interval, digits: int) -> str:
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def table(title: str, names: list[str], lines: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for line in [names, *lines]:
        print("  " + "".join(f"{cell:>24}" for cell in line), flush=True)


def curves(title: str, losses: dict[str, list[float]]) -> None:
    """The mean training loss over consecutive windows of steps."""
    lines = [
        [f"{first + 1}-{first + EVERY}", *[f"{fmean(loss[first : first + EVERY]):.4f}" for loss in losses.values()]]
        for first in range(0, STEPS, EVERY)
    ]  # fmt: skip
    table(title, ["steps", *losses], lines)


def compare(stage: str, work: Path, seeds: int, lr: float) -> None:
    """Train and evaluate every side with every seed, and print the results."""
    found: dict[str, list[float]] = {}
    tokens: list[int] = []
    for seed in range(1, seeds + 1):
        folder = work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        run = ours(folder, stage, seed, lr)
        held = list(rows(run, stage, "held_out"))
        tokens += [len(sequence) - 1 for sequence in learning_peers.whole(held, "sft")]
        models = {"ours": run.stage(stage).model}
        losses = {"ours": [line["loss"] for line in metrics(run, stage) if line["kind"] == "train"]}
        for side in PEERS[stage]:
            models[side] = folder / f"{stage}-{side}"
            start, samples = run.stage(stage).path / "initial", ordered(run, stage, seed)
            losses[side] = learning_peers.train(side, stage, start, samples, lr, seed, models[side])
        curves(f"{stage}, lr {lr:g}, seed {seed}: training loss", losses)
        for side, model in models.items():
            found.setdefault(side, []).extend(learning_peers.judged(stage, model, held))
        own = [line for line in metrics(run, stage) if line["kind"] == "eval"][-1]
        print(f"\n  by our stage's own measure: {own.get('perplexity', own.get('accuracy'))}")
    lines = []
    for side, values in found.items():
        apart = intervals.mean([mine - its for mine, its in zip(found["ours"], values, strict=True)])
        if stage == "sft":  # nats a sample, so that samples are what the interval is about
            scale = fmean(tokens)
            ratio = Interval(*(math.exp(-x / scale) for x in (apart.estimate, apart.high, apart.low)))
            lines.append([side, f"{math.exp(-sum(values) / sum(tokens)):.2f}", _span(ratio, 4)])
        else:
            lines.append([side, _span(intervals.share(sum(values), len(values)), 3), _span(apart, 3)])
    measure, apart_by = {"sft": ("perplexity", "ours / its, 95 %"), "reward": ("accuracy, 95 %", "ours - its, 95 %")}[
        stage
    ]
    table(f"{stage}, lr {lr:g}: {len(tokens)} held out", ["side", measure, apart_by], lines)


def ppo(work: Path, lr: float) -> None:
    run = ours(work / "seed-1", "ppo", 1, lr)
    lines = [line for line in metrics(run, "ppo") if line["kind"] == "train"]
    shown = [
        [f"{lines[first]['step']}-{lines[first + 9]['step']}"]
        + [f"{fmean(line[name] for line in lines[first : first + 10]):.3f}" for name in PPO_SHOWN]
        for first in range(0, len(lines) - 9, 10)
    ]
    table("ppo: means of ten rollouts", ["steps", *PPO_SHOWN], shown)
    command = [str(Path(sys.executable).with_name("hpc-rlhf")), "eval", str(run.path)]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["sft", "reward", "ppo"])
    parser.add_argument("--work", type=Path, required=True, help="output folder; existing results are kept")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="of SFT and of the reward model")
    options = parser.parse_args()
    work = options.work.resolve() / f"lr-{options.lr:g}"
    for stage in options.stages:
        if stage == "ppo":
            ppo(work, options.lr)
        else:
            compare(stage, work, options.seeds, options.lr)


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", MASTER_PORT=str(free_port()), HF_HUB_DISABLE_PROGRESS_BARS="1")
    main()
