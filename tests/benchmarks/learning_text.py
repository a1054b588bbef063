"""Compares pretraining with transformers' Trainer: a new model on the text of a Debian machine, from the same weights
and the same sequences in the same order.

The Trainer has no documents: its attention and its losses cross them. transformers alone judges both models, on
held-out documents one by one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from hpc_rlhf import intervals
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train.data import texts
from hpc_rlhf.train.runtime.alone import Alone
from tests.benchmarks import learning_peers, workload
from tests.benchmarks.learning import curves, ours, table
from tests.benchmarks.learning_peers import SAMPLES, STEPS
from tests.train.stages import metrics

FILES = {
    "licences": ("/usr/share/common-licenses/*",),
    "manuals": tuple(f"/usr/share/man/man{section}/*.gz" for section in (1, 5, 7, 8)),
    "documentation": tuple(f"/usr/share/doc/**/{name}" for name in ("copyright", "README*", "*.txt*", "*.md", "*.rst")),
}
LENGTH, PER_SOURCE, JUDGED = 256, 3 * 10**6, 150  # tokens, characters, documents
LARGE = 2**17  # bytes of a file that is left out


def text_of_this_machine(folder: Path) -> list[dict[str, Any]]:
    """The sources of a spec: all licences, and samples of the manual pages, as troff, and of the documentation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, patterns in FILES.items():
        path, size = folder / f"{name}.jsonl", 0
        if path.exists():
            continue
        files = {file for pattern in patterns for file in Path("/").glob(pattern[1:]) if file.is_file()}
        with path.open("w") as out:
            for text in _texts(sorted(files, key=lambda file: hashlib.sha256(str(file).encode()).digest())):
                size += out.write(json.dumps({"text": text}) + "\n")
                if size > PER_SOURCE:
                    break
    return [{"path": str(folder / f"{name}.jsonl"), "format": "text"} for name in FILES]


def _texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        content = file.read_bytes()
        if len(content) > LARGE:
            continue
        try:
            yield (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
        except UnicodeDecodeError:
            continue


def job(work: Path, seed: int, lr: float) -> dict[str, Any]:
    return {
        "name": "learning", "run_dir": str(work / "pretrain"), "seed": seed,
        "slurm": {"gpus_per_node": 0, "ranks_per_node": 1},
        "models": {"actor": {"from_scratch": workload.SHAPES["4 x 256"]}},
        "stages": {
            "pretrain": {
                "sources": text_of_this_machine(work.parent / "debian"), "sequence_length": LENGTH, "held_out": 0.1,
                "deduplicate": True, "filters": {"min_characters": 200}, "micro_batch": SAMPLES, "precision": "fp32",
                "global_batch": SAMPLES, "max_steps": STEPS, "lr": lr, "warmup": 0, "weight_decay": 0.0,
                "checkpoint_every": STEPS,
            },
        },
    }  # fmt: skip


def trainer(stage: str, start: Path, samples: list[Any], lr: float, seed: int, target: Path) -> None:
    """transformers' Trainer, given the sequences in order."""
    import datasets
    import torch
    import transformers

    torch.manual_seed(seed)
    rows = list(map(_padded, samples))
    peer = transformers.Trainer(
        transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        transformers.TrainingArguments(
            output_dir=str(target / "trainer"), max_steps=STEPS, learning_rate=lr, lr_scheduler_type="cosine",
            per_device_train_batch_size=SAMPLES, adam_beta2=0.95, max_grad_norm=1.0, use_cpu=True,
            train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    peer.train()
    learning_peers._keep(peer.model, [line["loss"] for line in peer.state.log_history if "loss" in line], target)


def _padded(row: Any) -> dict[str, list[int]]:
    """A sequence for the Trainer; the last of a source may be shorter than the others."""
    ids = row["ids"].tolist()
    missing = LENGTH - len(ids)
    mask = [1] * len(ids) + [0] * missing
    return {"input_ids": ids + [0] * missing, "attention_mask": mask, "labels": ids + [-100] * missing}


def judged(folder: Path, documents: list[list[int]]) -> list[float]:
    """The log-probability of each document, in nats."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for ids in map(torch.tensor, documents):
            log_probs = model(ids[None, :-1]).logits[0].log_softmax(-1)
            found.append(log_probs.gather(-1, ids[1:, None]).sum().item())
    return found


def compare(work: Path, seeds: int, lr: float) -> None:
    """Train and evaluate both sides with every seed, and print the results."""
    found: dict[str, list[float]] = {"ours": [], "Trainer": []}
    tokens: list[int] = []
    for seed in range(1, seeds + 1):
        folder = work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        fields = job(folder, seed, lr)
        run = ours(folder, "pretrain", fields)
        train, held = _data(JobSpec.model_validate(fields), run.stage("pretrain").path)
        peer = folder / "pretrain-Trainer"
        start = run.stage("pretrain").path / "initial"
        losses = {
            "ours": [line["loss"] for line in metrics(run, "pretrain") if line["kind"] == "train"],
            "Trainer": learning_peers.train("Trainer", "pretrain", start, train, lr, seed, peer),
        }
        curves(f"pretrain, lr {lr:g}, seed {seed}: training loss", losses)
        tokens += [len(ids) - 1 for ids in held]
        for side, model in {"ours": run.stage("pretrain").model, "Trainer": peer}.items():
            found[side] += judged(model, held)
        last = [line for line in metrics(run, "pretrain") if line["kind"] == "eval"][-1]
        print(f"\n  by our stage's own measure: {last}")
    apart = intervals.mean([mine - its for mine, its in zip(found["ours"], found["Trainer"], strict=True)])
    ratios = [math.exp(-nats / fmean(tokens)) for nats in (apart.estimate, apart.high, apart.low)]
    lines = [[side, f"{math.exp(-sum(values) / sum(tokens)):.2f}"] for side, values in found.items()]
    table(f"pretrain, lr {lr:g}: {len(tokens)} documents held out", ["side", "perplexity"], lines)
    print(f"\n  ours / Trainer, 95 %: {ratios[0]:.4f} [{ratios[1]:.4f}, {ratios[2]:.4f}]")


def _data(spec: JobSpec, folder: Path) -> tuple[list[Any], list[list[int]]]:
    """The sequences of all steps in the order our stage took them, and the beginnings of held-out documents."""
    import numpy as np
    from transformers import AutoTokenizer

    from hpc_rlhf.train.stages.pretrain import Text

    settings: Any = spec.stage("pretrain")
    world: Any = Alone()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    streams = texts.prepare(settings, spec.seed, tokenizer, folder / "data", world)
    text, held = Text.of(streams, settings, spec.seed), []
    for _, stream in streams:
        ids, lengths = stream.read(0, len(stream))
        documents = np.split(ids, np.cumsum(lengths)[:-1])[:JUDGED]
        held += [document[:LENGTH].tolist() for document in documents]
    return [text.train[text.index_at(place)] for place in range(SAMPLES * STEPS)], held
