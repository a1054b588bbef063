"""Compares learning with peers, from the same weights and the same samples in the same order.

On HH data: held-out perplexity of SFT beside DeepSpeed-Chat's loop, held-out accuracy of the reward model beside its
and TRL's, that of KTO beside TRL's, and PPO's reward and KL from those two models. On jobs/tiny-grpo.yaml: held-out
accuracy of GRPO beside TRL's while they train. On the text of a Debian machine: held-out perplexity of pretraining
beside transformers' Trainer. All sides train in float32 by the same AdamW and cosine, without dropout and weight decay,
and transformers alone judges what each has made. Peers pad to the longest of a batch, which gives the same numbers as
padding to 512.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from hpc_rlhf import intervals
from hpc_rlhf.intervals import Interval
from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train.data.arrow import Rows
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.stages.kto import Mismatched
from tests.benchmarks import learning_peers, workload
from tests.benchmarks.learning_peers import GRPO, GRPO_EVERY, KTO, PEERS, SAMPLES, STEPS, Row
from tests.train.stages import make_run, metrics

EVERY = 20
# The stages whose models a stage starts from.
BEFORE = {"kto": ("sft",), "ppo": ("sft", "reward"), "grpo": ("sft",)}
# Share of the prompts. An accuracy needs far more pairs than a perplexity needs texts.
HELD_OUT = {"sft": 0.05, "reward": 0.5, "kto": 0.5, "ppo": 0.25}
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
    if stage == "kto":
        model, stages = str(work / "sft" / "stages/sft/model"), {"sft": trained, "kto": {**trained, **KTO}}
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


def grpo_job(work: Path, stage: str, seed: int) -> dict[str, Any]:
    """The job of jobs/tiny-grpo.yaml on one rank. Checkpoints keep GRPO's models on the way; the job for SFT stops GRPO
    after a step."""
    on_the_way = {"checkpoint_every": GRPO_EVERY, "keep_checkpoints": 1000, "eval_every": None}
    stages = {"sft": GRPO["stages"]["sft"], "grpo": {**GRPO["stages"]["grpo"], **on_the_way}}
    if stage == "sft":
        stages["grpo"]["max_steps"] = 1
    return {
        **GRPO, "run_dir": str(work / stage), "seed": seed, "stages": stages,
        "slurm": {"gpus_per_node": 0, "ranks_per_node": 1},
    }  # fmt: skip


def ours(work: Path, stage: str, spec: dict[str, Any]) -> RunDir:
    """Run our side unless it has already finished."""
    run = RunDir(work / stage)
    if not run.path.exists():
        run = make_run(JobSpec.model_validate(spec))
        for made in BEFORE.get(stage, ()):
            shutil.copytree(RunDir(work / made).stage(made).model, run.stage(made).model)
    file = work / f"{stage}.json"
    file.write_text(json.dumps(spec))
    with (work / f"{stage}.log").open("a") as log:
        command = [str(Path(sys.executable).with_name("hpc-rlhf")), "run", str(file)]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return run


def rows(run: RunDir, stage: str, part: str) -> Rows:
    """The samples that our stage trained on or held out."""
    (path,) = run.stage(stage).data.glob(f"*/{part}.arrow")
    return Rows(path)


def ordered(run: RunDir, stage: str, seed: int, count: int = SAMPLES * STEPS) -> list[Row]:
    """The samples of all steps in the order our stage took them."""
    train = rows(run, stage, "train")
    return [train[sample_at(place, len(train), seed, stage)] for place in range(count)]


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
        run = ours(folder, stage, job(folder, stage, seed, lr))
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


def kto(work: Path, seeds: int, lr: float) -> None:
    """Train both sides with every seed from our SFT model, and print how often they prefer good responses."""
    pooled: dict[str, list[float]] = {"ours": [], "TRL": []}
    for seed in range(1, seeds + 1):
        folder = work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        start = ours(folder, "sft", job(folder, "sft", seed, lr)).stage("sft").model
        run = ours(folder, "kto", job(folder, "kto", seed, lr))
        train, peer = Mismatched(rows(run, "kto", "train")), folder / "kto-TRL"
        samples = [train[sample_at(place, len(train), seed, "kto")] for place in range(SAMPLES * STEPS)]
        losses = {
            "ours": [line["loss"] for line in metrics(run, "kto") if line["kind"] == "train"],
            "TRL": learning_peers.train("TRL", "kto", start, samples, KTO["lr"], seed, peer),
        }
        curves(f"kto, lr {KTO['lr']:g}, seed {seed}: training loss", losses)
        held = list(rows(run, "kto", "held_out"))
        for side, model in (("ours", run.stage("kto").model), ("TRL", peer)):
            pooled[side] += learning_peers.preferred(start, model, held)
    apart = intervals.mean([mine - its for mine, its in zip(pooled["ours"], pooled["TRL"], strict=True)])
    shares = [_span(intervals.share(sum(each), len(each)), 3) for each in pooled.values()]
    table(
        f"kto: {len(pooled['ours'])} held-out pairs", ["ours", "TRL", "ours - its, 95 %"], [[*shares, _span(apart, 3)]]
    )


def ppo(work: Path, lr: float) -> None:
    run = ours(work / "seed-1", "ppo", job(work / "seed-1", "ppo", 1, lr))
    lines = [line for line in metrics(run, "ppo") if line["kind"] == "train"]
    shown = [
        [f"{lines[first]['step']}-{lines[first + 9]['step']}"]
        + [f"{fmean(line[name] for line in lines[first : first + 10]):.3f}" for name in PPO_SHOWN]
        for first in range(0, len(lines) - 9, 10)
    ]
    table("ppo: means of ten rollouts", ["steps", *PPO_SHOWN], shown)
    command = [str(Path(sys.executable).with_name("hpc-rlhf")), "eval", str(run.path)]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def used(file: Path, call: Callable[[], Any]) -> float:
    """The seconds of CPU time that a call's processes used when it was made first."""
    before = os.times()
    call()
    after = os.times()
    if not file.exists():
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        file.write_text(str(seconds))
    return float(file.read_text())


def on_the_way(run: RunDir, peer: Path, step: int) -> list[tuple[Path, dict[str, Any]]]:
    """The models of both sides after a step, as ``learning_peers.accuracy`` takes them."""
    from safetensors.torch import load_file

    start, stage = run.stage("sft").model, run.stage("grpo")
    if step == 0:
        return [(start, {}), (start, {})]
    if step == GRPO["stages"]["grpo"]["max_steps"]:
        return [(stage.model, {}), (peer, {})]
    saved, prefix = load_file(stage.checkpoints / f"step-{step:08d}/actor/00000.safetensors"), "weight causal."
    weights = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    return [(start, weights), (peer / f"trl/checkpoint-{step}", {})]


def grpo(work: Path, seeds: int) -> None:
    """Train both sides with every seed, and print the accuracy on held-out prompts after some steps."""
    spec, sides = GRPO["stages"]["grpo"], ("ours", "TRL")
    pooled: dict[int, list[list[float]]] = {}
    costs = []
    for seed in range(1, seeds + 1):
        folder = work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        ours(folder, "sft", grpo_job(folder, "sft", seed))
        cost = used(folder / "ours.seconds", partial(ours, folder, "grpo", grpo_job(folder, "grpo", seed)))
        run, peer = RunDir(folder / "grpo"), folder / "grpo-TRL"
        samples = ordered(run, "grpo", seed, spec["global_batch"] // spec["group_size"] * spec["max_steps"])
        start = run.stage("sft").model
        train = partial(learning_peers.train, "TRL", "grpo", start, samples, spec["lr"], seed, peer)
        costs.append([str(seed), f"{cost:.0f}", f"{used(folder / 'TRL.seconds', train):.0f}"])
        held, curve = list(rows(run, "grpo", "held_out")), []
        for step in range(0, spec["max_steps"] + 1, GRPO_EVERY):
            judged = [learning_peers.accuracy(*model, held, seed) for model in on_the_way(run, peer, step)]
            columns = [list(each) for kind in zip(*judged, strict=True) for each in kind]
            pooled[step] = [old + new for old, new in zip(pooled.get(step, [[]] * 4), columns, strict=True)]
            curve.append([str(step), *[f"{fmean(column):.3f}" for column in columns]])
        titles = [f"{side}, {kind}" for kind in ("most likely", "sampled") for side in sides]
        table(f"grpo, seed {seed}: accuracy on {len(held)} prompts", ["steps", *titles], curve)
    table("grpo: seconds of CPU time", ["seed", *sides], costs)
    lines = []
    for step, (likely, its_likely, sampled, its_sampled) in pooled.items():
        line = [str(step)]
        for mine, its in ((likely, its_likely), (sampled, its_sampled)):
            apart = intervals.mean([one - other for one, other in zip(mine, its, strict=True)])
            line += [f"{fmean(mine):.3f}", f"{fmean(its):.3f}", _span(apart, 3)]
        lines.append(line)
    names = ["most likely: ours", "TRL", "ours - its, 95 %", "sampled: ours", "TRL", "ours - its, 95 %"]
    table(f"grpo: accuracy over {seeds} seeds", ["steps", *names], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["pretrain", "sft", "reward", "kto", "ppo", "grpo"])
    parser.add_argument("--work", type=Path, required=True, help="output folder; existing results are kept")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="of SFT and of the reward model")
    options = parser.parse_args()
    work = options.work.resolve() / f"lr-{options.lr:g}"
    for stage in options.stages:
        if stage == "pretrain":
            from tests.benchmarks import learning_text

            learning_text.compare(work, options.seeds, options.lr)
        elif stage == "kto":
            kto(work, options.seeds, options.lr)
        elif stage == "ppo":
            ppo(work, options.lr)
        elif stage == "grpo":
            grpo(options.work.resolve() / "grpo", options.seeds)
        else:
            compare(stage, work, options.seeds, options.lr)


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", MASTER_PORT=str(free_port()), HF_HUB_DISABLE_PROGRESS_BARS="1")
    main()
