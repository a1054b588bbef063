"""Tokenizes a generated corpus for pretraining: its speed, its memory, and what kills and a damaged shard do to it.

The speed is compared with that of the tokenizer alone on the same texts in memory, in batches of 1,000 as in
``datasets.map``; each side has a process of its own, and its turn in every round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

from hpc_rlhf.errors import HpcRlhfError

REPOSITORY = Path(__file__).parents[2]
SHARD = 32 * 10**6  # bytes, about
VOCABULARY, BATCH, SEED = 16_384, 1000, 7
DAMAGED_LINE = 12


def make_corpus(folder: Path, size: int) -> None:
    """Write shards of jsonl of about ``size`` bytes together: documents of made words, by Zipf's law."""
    draw = np.random.default_rng(SEED)
    letters = np.array(list("abcdefghijklmnoprstuvwy"))
    words = np.array(["".join(draw.choice(letters, length)) for length in draw.integers(1, 11, 50_000)])
    shares = np.cumsum(1 / np.arange(3, len(words) + 3))
    folder.mkdir(parents=True)
    shards = max(8, round(size / SHARD))
    for number in range(shards):
        left = size // shards
        with (folder / f"{number:04}.jsonl").open("w") as file:
            while left > 0:
                count = 5 + int(draw.lognormal(5.5, 1.0))
                drawn = words[np.searchsorted(shares, draw.random(count) * shares[-1])]
                ends = draw.choice(np.array([" ", ", ", ". ", ".\n"]), count, p=[0.88, 0.05, 0.05, 0.02])
                left -= file.write(json.dumps({"text": "".join(np.char.add(drawn, ends))}) + "\n")


def train_tokenizer(corpus: Path, target: Path, characters: int = 2 * 10**7) -> None:
    """A tokenizer of some of the corpus."""
    from hpc_rlhf.train.models.tokenizers import train_bpe

    def beginning() -> Any:
        left = characters
        for line in sorted(corpus.iterdir())[0].open():
            text = json.loads(line)["text"]
            yield text
            left -= len(text)
            if left < 0:
                return

    train_bpe(beginning(), VOCABULARY).save_pretrained(str(target))


def write(work: Path, target: Path) -> None:
    """Tokenize the corpus as one rank does, and print the seconds, those of CPU time, and the peak of memory in MiB.

    A small corpus has as many parts and segments as a large one, so that kills come between them.
    """
    from transformers import PreTrainedTokenizerFast

    from hpc_rlhf.spec.source import SourceSpec
    from hpc_rlhf.spec.stages import PretrainSpec
    from hpc_rlhf.train.data import documents, texts, token_files
    from hpc_rlhf.train.runtime.alone import Alone

    world, size = cast(Any, Alone()), _size(work)
    documents.PART_BYTES = min(documents.PART_BYTES, size // 8)
    token_files.SEGMENT = min(token_files.SEGMENT, size // 64)
    spec = PretrainSpec(sources=(SourceSpec(path=str(work / "corpus"), format="text"),))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    print("ready", flush=True)
    start, worked = time.perf_counter(), time.process_time()
    try:
        ((train, held_out),) = texts.prepare(spec, SEED, tokenizer, target, world)
    except HpcRlhfError as error:
        sys.exit(f"hpc-rlhf: {error}")
    seconds, cpu = time.perf_counter() - start, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tokens = len(train) + len(held_out)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": tokens, "peak_mib": peak}), flush=True)


def _size(work: Path) -> int:
    return sum(path.stat().st_size for path in (work / "corpus").iterdir())


def alone(work: Path) -> None:
    """Tokenize the corpus by the tokenizer alone, and print the seconds, and those of CPU time."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").backend_tokenizer
    seconds, cpu, tokens = 0.0, 0.0, 0
    for shard in sorted((work / "corpus").iterdir()):
        texts = [json.loads(line)["text"] for line in shard.open()]
        for first in range(0, len(texts), BATCH):
            start, worked = time.perf_counter(), time.process_time()
            encoded = tokenizer.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False)
            seconds, cpu = seconds + time.perf_counter() - start, cpu + time.process_time() - worked
            tokens += sum(map(len, encoded))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": tokens}), flush=True)


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.benchmarks.tokenizing", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(*arguments: object) -> dict[str, Any]:
    out, err = (process := started(*arguments)).communicate()
    if process.returncode:
        raise SystemExit(err)
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


def digest(folder: Path) -> str:
    """A hash of the files of a folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(str(path.relative_to(folder)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def write_under_kills(work: Path, target: Path, kills: int, seconds: float) -> int:
    """Tokenize the corpus in a process that is killed ``kills`` times, each after a random time, and then in one that
    is not.

    Args:
        seconds: what it takes without kills.

    Returns:
        How many of the killed processes had not finished.
    """
    draw, unfinished = random.Random(SEED), 0
    for _ in range(kills):
        process = started("write", "--work", work, "--target", target)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.random() * 2 * seconds / kills)
        process.kill()
        unfinished += process.wait() != 0
    result("write", "--work", work, "--target", target)
    return unfinished


def error_of_damage(work: Path, target: Path) -> tuple[Path, str]:
    """Cut a line of the last shard in half: the shard, and what tokenizing it then says."""
    shard = sorted((work / "corpus").iterdir())[-1]
    lines = shard.read_text().splitlines(keepends=True)
    lines[DAMAGED_LINE - 1] = lines[DAMAGED_LINE - 1][:20] + "\n"
    shard.write_text("".join(lines))
    _, err = (process := started("write", "--work", work, "--target", target)).communicate()
    return shard, err if process.returncode else "no error"


def measure(work: Path, size: int, kills: int, rounds: int) -> dict[str, Any]:
    """Make a corpus and take all measurements on it. Speeds are medians of the rounds, in tokens per second."""
    make_corpus(work / "corpus", size)
    train_tokenizer(work / "corpus", work / "tokenizer", size // 10)
    pairs = [
        (result("alone", "--work", work), result("write", "--work", work, "--target", work / f"tokens-{number}"))
        for number in range(rounds)
    ]
    ours = pairs[0][1]

    def share(key: str) -> float:
        return median(own["tokens"] / own[key] / (alone["tokens"] / alone[key]) for alone, own in pairs)

    unfinished = write_under_kills(work, work / "killed", kills, ours["seconds"])
    shard, error = error_of_damage(work, work / "damaged")
    return {
        "megabytes": _size(work) / 1e6,
        "cores": len(os.sched_getaffinity(0)), "tokens": ours["tokens"],
        "tokenizer_alone": median(alone["tokens"] / alone["seconds"] for alone, _ in pairs),
        "ours": median(own["tokens"] / own["seconds"] for _, own in pairs),
        "share": share("seconds"), "share_by_cpu_time": share("cpu"),
        "peak_mib": max(own["peak_mib"] for _, own in pairs),
        "kills": kills, "killed_before_the_end": unfinished,
        "same_after_kills": digest(work / "tokens-0") == digest(work / "killed"),
        "damage": error.strip(), "names_the_line": f"{shard}:{DAMAGED_LINE}:" in error,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", nargs="?", choices=("all", "write", "alone"), default="all")
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpus and the tokens")
    parser.add_argument("--target", type=Path, help="folder for the tokens of `write`")
    parser.add_argument("--size", type=float, default=2e9, help="bytes of the corpus")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.task == "write":
        write(options.work, options.target)
    elif options.task == "alone":
        alone(options.work)
    else:
        print(json.dumps(measure(options.work, int(options.size), options.kills, options.rounds), indent=1))


if __name__ == "__main__":
    main()
