"""The reward model: learn from pairs which answer people preferred.

Step 2 of DeepSpeed-Chat (arXiv 2308.01320).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import RewardSpec
from hpc_rlhf.train.algorithms.reward import pairwise_loss
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import micro_batches, sample_at, total_steps
from hpc_rlhf.train.data.tokenized import TokenBatch, pad_right
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.load import check_fits, load_reward, positions
from hpc_rlhf.train.stages.common import adapted, evaluation_batches, finish, load_engines, save_engines


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, RewardSpec)

    # 1. Data.
    data = context.data()
    count = len(data.train)
    total = total_steps(count, spec.epochs, context.per_step, spec.max_steps)

    def batch_of(rows: list[dict[str, Any]]) -> TokenBatch:
        """The chosen ones, then the rejected ones: (2 * pairs, length)."""
        prompts = [row["prompt_ids"] for row in rows] * 2
        answers = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        return pad_right(prompts, answers, context.tokenizer.pad_token_id).to(context.world.device)

    # 2. Model.
    source = context.start_model(context.spec.models.reward or context.spec.models.actor)
    with engines.sharded_loading(context.ds_config):
        model = load_reward(source, context.dtype, context.spec.seed, spec.dropout)
    check_fits(model.classifier.config, context.tokenizer, context.longest, source)
    adapted(model.classifier, spec, context.spec.seed)
    engine = engines.training_engine(model, context.ds_config, spec, spec.lr, total)

    def compare(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        values = engine(batch.input_ids, batch.mask, positions(batch.mask))
        chosen, rejected = values.chunk(2)
        return pairwise_loss(chosen, rejected, *batch.input_ids.chunk(2), *batch.mask.chunk(2))

    def accuracy() -> float | None:
        """Of the held-out pairs; None where there are none."""
        engine.eval()
        sums = {"right": 0.0, "pairs": 0.0}
        with torch.no_grad():
            for rows, real in evaluation_batches(data.held_out, context):
                _, chosen, rejected = compare(batch_of(rows))
                if real:
                    sums["right"] += (chosen > rejected).sum().item()
                    sums["pairs"] += len(rows)
        engine.train()
        sums = context.world.sums(sums)
        return sums["right"] / sums["pairs"] if sums["pairs"] else None

    # 3. Resume.
    found = context.resume(load_engines({"engine": engine}))
    first = found.step if found else 0

    def write(folder: Path) -> None:
        save_engines(folder, {"engine": engine})

    # 4. Train.
    for step in range(first, total):
        context.safe_point(step, write, {})
        context.reseed(step)
        stream = micro_batches(
            step, context.micro, context.accumulation, context.world.rank, context.world.size
        )
        indices = [[sample_at(p, count, context.spec.seed, "reward") for p in block] for block in stream]
        batches = [batch_of([data.train[i] for i in block]) for block in indices]
        rate = engines.learning_rate(engine)
        sums = {"loss": 0.0, "right": 0.0, "margin": 0.0}

        def scaled_loss(batch: TokenBatch, sums: dict[str, float] = sums) -> Tensor:
            losses, chosen, rejected = compare(batch)
            sums["loss"] += losses.sum().item()
            sums["right"] += (chosen > rejected).sum().item()
            sums["margin"] += (chosen - rejected).sum().item()
            return losses.sum() * (context.loss_scale / context.per_step)

        norm = engines.optimizer_step(engine, [partial(scaled_loss, batch) for batch in batches])
        means = {key: total_sum / context.per_step for key, total_sum in context.world.sums(sums).items()}
        values = {"loss": means["loss"], "accuracy": means["right"], "margin": means["margin"], "lr": rate}
        context.metrics.log(step + 1, total, "train", {**values, "grad_norm": norm})
    context.safe_point(total, write, {})

    # 5. Measure, and hand over.
    after = accuracy()
    context.metrics.log(total, total, "eval", {"accuracy": after})
    finish(context, total, {"": model.classifier}, {"accuracy": after})
