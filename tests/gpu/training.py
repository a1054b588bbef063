"""SFT's optimizer steps beside a plain DeepSpeed loop and transformers, on the same tokens.

MFU follows PaLM (arXiv 2204.02311, appendix B): 6 FLOPs per weight and token plus 12 per layer, width and position for
attention, over the measured rate of a bf16 matrix product. Padding does not count as tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.runtime.world import World
from tests.gpu.scale import Scale, new_model, padded, peak_gib, reset_memory, seconds, sequences
from tests.train.stages import make_run


def training(scale: Scale, world: World, work: Path, peak: float) -> dict[str, Any]:
    """Real tokens per second and MFU of optimizer steps with fp32 Adam states and bf16 arithmetic."""
    rows = sequences(scale, scale.sequences, 2 * scale.longest, seed=3)
    tokens, shape = sum(map(len, rows)), scale.shape
    attention = 12 * shape["num_hidden_layers"] * shape["hidden_size"] * sum(len(row) ** 2 for row in rows) / tokens
    fields = {
        "name": "speed", "run_dir": str(work / "run"), "slurm": {"gpus_per_node": 0, "ranks_per_node": 1},
        "data": {"sources": [{"demo": 100}]},
        "models": {"actor": {"from_scratch": {"model_type": "opt", **shape}}},
        "stages": {
            "sft": {"lr": 1e-5, "micro_batch": scale.sequences, "global_batch": scale.sequences, "precision": "bf16"}
        },
    }  # fmt: skip
    spec = JobSpec.model_validate(fields)
    config = json.loads(make_run(spec).ds_config("sft").read_text())
    steps: dict[str, Callable[[], tuple[Callable[[], object], nn.Module]]] = {
        "ours": lambda: ours(scale, world, rows, spec, config),
        "DeepSpeed": lambda: plain_deepspeed(scale, world, rows, config),
        "transformers": lambda: transformers(scale, world, rows),
    }
    results: dict[str, Any] = {}
    for side, prepare in steps.items():
        reset_memory()
        step, model = prepare()
        rate = tokens / seconds(step, scale.steps)
        flops = 6 * sum(p.numel() for p in model.parameters()) + attention
        results[side] = {"rate": rate, "peak_gib": peak_gib(), "mfu": rate * flops / peak}
        del step, model
    return results


def ours(
    scale: Scale, world: World, rows: list[list[int]], spec: JobSpec, config: dict[str, Any]
) -> tuple[Callable[[], object], nn.Module]:
    assert spec.stages.sft is not None
    model = LanguageModel(new_model(scale, world, torch.bfloat16))
    packed_attention.enable(model.causal)
    engine = engines.training_engine(model, config, spec.stages.sft, 1e-5, 1000)
    batch = Ragged.of(rows, world.device)
    predicted = batch.tail([len(row) - 1 for row in rows])

    def loss() -> Tensor:
        return -engine(batch.ids, batch.lengths, predicted, summed=True)[0] / len(predicted)

    return lambda: engines.optimizer_step(engine, [loss]), model


def plain_deepspeed(
    scale: Scale, world: World, rows: list[list[int]], config: dict[str, Any]
) -> tuple[Callable[[], object], nn.Module]:
    """As DeepSpeed-Chat trains: our DeepSpeed config and optimizer, transformers' loss, padded rows."""
    import deepspeed

    model = new_model(scale, world, torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(config))
    batch = labelled(rows, world)

    def step() -> None:
        engine.backward(engine(**batch, use_cache=False).loss)
        engine.step()

    return step, model


def transformers(scale: Scale, world: World, rows: list[list[int]]) -> tuple[Callable[[], object], nn.Module]:
    """As transformers' Trainer does with ``bf16=True``: fp32 weights, bf16 autocast, fused AdamW, padded rows."""
    model = new_model(scale, world, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = labelled(rows, world)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(world.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, model


def labelled(rows: list[list[int]], world: World) -> dict[str, Tensor]:
    """Padded rows as transformers takes them, to predict their real tokens."""
    ids, mask = padded(rows, world, left=False)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
