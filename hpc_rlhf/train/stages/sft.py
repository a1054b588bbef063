"""Supervised fine-tuning: learn the chosen answers by next-token prediction.

Step 1 of DeepSpeed-Chat (arXiv 2308.01320) and InstructGPT (arXiv 2203.02155).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.train.algorithms.logprobs import next_token_loss_sum
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import micro_batches, sample_at, total_steps
from hpc_rlhf.train.data.tokenized import TokenBatch, pad_right
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.load import call, check_fits, load_causal, positions
from hpc_rlhf.train.stages.common import adapted, evaluation_batches, finish, load_engines, save_engines


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, SftSpec)

    # 1. Data.
    data = context.data()
    count = len(data.train)
    total = total_steps(count, spec.epochs, context.per_step, spec.max_steps)

    def batch_of(rows: list[dict[str, Any]]) -> TokenBatch:
        prompts, answers = [row["prompt_ids"] for row in rows], [row["chosen_ids"] for row in rows]
        return pad_right(prompts, answers, context.tokenizer.pad_token_id).to(context.world.device)

    def learnt(batch: TokenBatch) -> Tensor:
        mask = (batch.answer_mask if spec.answer_only else batch.mask).clone()
        mask[:, 0] = False
        return mask

    # 2. Model.
    source = context.start_model(context.spec.models.actor)
    with engines.sharded_loading(context.ds_config):
        model = load_causal(source, context.dtype, spec.dropout)
    check_fits(model.config, context.tokenizer, context.longest, source)
    adapted(model, spec, context.spec.seed)
    engine = engines.training_engine(model, context.ds_config, spec, spec.lr, total)

    def loss_sum(batch: TokenBatch) -> Tensor:
        logits = call(engine, batch.input_ids, batch.mask, positions(batch.mask)).logits
        return next_token_loss_sum(logits, batch.input_ids, learnt(batch))

    def perplexity() -> float | None:
        """Of the held-out samples; None where there are none."""
        engine.eval()
        sums = {"loss": 0.0, "tokens": 0.0}
        with torch.no_grad():
            for rows, real in evaluation_batches(data.held_out, context):
                batch = batch_of(rows)
                loss = loss_sum(batch)
                if real:
                    sums["loss"] += loss.item()
                    sums["tokens"] += learnt(batch).sum().item()
        engine.train()
        sums = context.world.sums(sums)
        return math.exp(min(50.0, sums["loss"] / sums["tokens"])) if sums["tokens"] else None

    # 3. Resume, or measure where it starts.
    state: dict[str, Any] = {}
    found = context.resume(load_engines({"engine": engine}))
    if found is not None:
        state, first = found.state, found.step
    else:
        state, first = {"perplexity_before": perplexity()}, 0
        context.metrics.log(0, total, "eval", {"perplexity": state["perplexity_before"]})

    def write(folder: Path) -> None:
        save_engines(folder, {"engine": engine})

    # 4. Train.
    for step in range(first, total):
        context.safe_point(step, write, state)
        context.reseed(step)
        stream = micro_batches(
            step, context.micro, context.accumulation, context.world.rank, context.world.size
        )
        indices = [[sample_at(p, count, context.spec.seed, "sft") for p in block] for block in stream]
        batches = [batch_of([data.train[i] for i in block]) for block in indices]
        tokens = context.world.sums({"tokens": float(sum(learnt(b).sum().item() for b in batches))})["tokens"]
        rate = engines.learning_rate(engine)
        sums: list[float] = []

        def scaled_loss(batch: TokenBatch, tokens: float = tokens, sums: list[float] = sums) -> Tensor:
            loss = loss_sum(batch)
            sums.append(loss.item())
            return loss * (context.loss_scale / tokens)

        norm = engines.optimizer_step(engine, [partial(scaled_loss, batch) for batch in batches])
        loss = context.world.sums({"loss": sum(sums)})["loss"] / tokens
        context.metrics.log(
            step + 1, total, "train", {"loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens}
        )
    context.safe_point(total, write, state)

    # 5. Measure where it ends, and hand over.
    after = perplexity()
    context.metrics.log(total, total, "eval", {"perplexity": after})
    finish(context, total, {"": model}, {**state, "perplexity_after": after})
