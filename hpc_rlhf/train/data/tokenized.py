"""A stage's samples as tokens on disk, and batches of them as tensors."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf import manifest
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec.model import JobSpec
from hpc_rlhf.train.data.rows import Sample
from hpc_rlhf.train.data.sources import stage_samples
from hpc_rlhf.train.world import World


@dataclass(frozen=True)
class StageData:
    """A stage's token data sets, memory-mapped.

    Rows have ``prompt`` and ``prompt_ids``; for SFT and the reward model also ``chosen_ids``, and
    for the reward model ``rejected_ids``. Answer ids end with EOS unless they were cut. Nothing may be
    held out.
    """

    train: Any
    held_out: Any


def encode_sample(sample: Sample, tokenizer: Any, spec: JobSpec, stage: str) -> dict[str, Any] | None:
    """One sample as token ids, or None where PPO's prompt is too long to be cut.

    A long prompt is cut at the left; a long answer at the right, and then has no EOS.
    """
    limit = spec.data.max_prompt_tokens
    prompt_ids = tokenizer(sample["prompt"])["input_ids"] if sample["prompt"] else []
    if not sample["prompt"] and tokenizer.bos_token_id is not None:
        prompt_ids = [tokenizer.bos_token_id]
    # Some tokenizers put EOS behind every text; a prompt goes on.
    if len(prompt_ids) > 1 and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids = prompt_ids[:-1]
    if stage == "ppo" and len(prompt_ids) > limit:
        return None
    row: dict[str, Any] = {"prompt": sample["prompt"], "prompt_ids": prompt_ids[-limit:]}
    for key in {"sft": ("chosen",), "reward": ("chosen", "rejected"), "ppo": ()}[stage]:
        ids = tokenizer(sample[key], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        row[f"{key}_ids"] = ids[: spec.data.max_answer_tokens]
    return row


def _fingerprint(spec: JobSpec, stage: str, tokenizer: Any) -> str:
    facts = {
        "data": spec.data.model_dump(mode="json"),
        "stages": spec.stage_names,
        "seed": spec.seed,
        "stage": stage,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _write(spec: JobSpec, stage: str, tokenizer: Any, folder: Path) -> dict[str, int]:
    """Write a stage's token data sets, and tell how many rows each has. One without rows is left out."""
    import datasets

    counts = {}
    for name, samples in zip(("train", "held_out"), stage_samples(spec, stage), strict=True):
        encoded = (encode_sample(sample, tokenizer, spec, stage) for sample in samples)
        rows = [row for row in encoded if row is not None]
        if name == "train" and not rows:
            raise HpcRlhfError(
                f"every prompt is longer than data.max_prompt_tokens, {spec.data.max_prompt_tokens}",
                where=f"stage {stage}",
                hint="raise data.max_prompt_tokens",
                exit_code=RUN_FAILED,
            )
        if rows:  # datasets cannot load an empty one
            datasets.Dataset.from_list(rows).save_to_disk(str(folder / name))
        counts[name] = len(rows)
    return counts


def prepare(spec: JobSpec, stage: str, tokenizer: Any, folder: Path, world: World) -> StageData:
    """Tokenise a stage's data once (rank 0 writes, the others wait), or find it from an earlier attempt.

    Raises:
        HpcRlhfError: the data cannot be read, or holds nothing for this stage.
    """
    import datasets

    target = folder / _fingerprint(spec, stage, tokenizer)

    def make() -> dict[str, Any]:
        if manifest.defect(target) is not None:
            shutil.rmtree(target, ignore_errors=True)
            manifest.write(target, {"stage": stage, "rows": _write(spec, stage, tokenizer, target)})
        return manifest.require(target, "the tokenised data")

    rows = world.on_main(make)["rows"]
    return StageData(
        train=datasets.load_from_disk(str(target / "train")),
        held_out=datasets.load_from_disk(str(target / "held_out")) if rows["held_out"] else [],
    )


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences padded to the longest of them.

    Attributes:
        input_ids: (batch, length), int64.
        mask: (batch, length), bool; True on real tokens.
        answer_mask: (batch, length), bool; True on answer tokens, EOS included.
    """

    input_ids: Tensor
    mask: Tensor
    answer_mask: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(self.input_ids.to(device), self.mask.to(device), self.answer_mask.to(device))


def pad_right(prompts: list[list[int]], answers: list[list[int]], pad_id: int) -> TokenBatch:
    """Prompts with their answers, padded on the right."""
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    shape = (len(prompts), max(lengths))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    answer_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        input_ids[row, : lengths[row]] = torch.tensor(prompt + answer, dtype=torch.int64)
        answer_mask[row, len(prompt) : lengths[row]] = True
    mask = torch.arange(shape[1]).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    return TokenBatch(input_ids, mask, answer_mask)


def pad_left(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and their mask: (batch, length) int64 and bool, True on real tokens."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
    lengths = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
    return ids, torch.arange(width).unsqueeze(0) >= width - lengths
