"""Supervised fine-tuning: learn the chosen answers by next-token prediction.

Step 1 of DeepSpeed-Chat (arXiv 2308.01320) and InstructGPT (arXiv 2203.02155).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.data.tokenized import token_lengths
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.interruptible_loading import loading
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import check_fits, load_causal
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.stages.common import Batches, adapted, checked, finish, load_engines, save_engines


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, SftSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = context.batch.micro * context.longest
    batches = Batches(context, "sft", token_lengths(data.train, "prompt_ids", "chosen_ids"), budget)

    def learnt(row: dict[str, Any]) -> int:
        """Tokens at a row's end that are learnt; its first one cannot be predicted."""
        answer, whole = len(row["chosen_ids"]), len(row["prompt_ids"]) + len(row["chosen_ids"])
        return min(answer if spec.answer_only else whole, whole - 1)

    # 2. Model.
    source = context.start_model(context.spec.models.actor)
    with loading(context.stop, context.ds_config):
        model = load_causal(source, context.dtype, spec.dropout)
    check_fits(model.config, context.tokenizer, context.longest, source)
    adapted(model, spec, context.spec.seed)
    engine = engines.training_engine(LanguageModel(model), context.ds_config, spec, spec.lr, total)

    def loss_sum(rows: list[dict[str, Any]]) -> Tensor:
        batch = Ragged.of([row["prompt_ids"] + row["chosen_ids"] for row in rows], context.world.device)
        predicted = batch.tail([learnt(row) for row in rows])
        log_prob: Tensor = engine(batch.ids, batch.lengths, predicted, summed=True)[0]
        return -log_prob

    def perplexity() -> float | None:
        """Of the held-out samples; None where there are none."""
        rows = data.held_out
        if not len(rows):
            return None
        engine.eval()
        sums = {"loss": 0.0, "tokens": 0.0}
        some = Batches(context, "held out", token_lengths(rows, "prompt_ids", "chosen_ids"), budget)
        with torch.no_grad():
            for chosen, real in some.held_out(rows):
                context.stop.check("evaluation")
                loss = loss_sum(chosen)
                if real:
                    sums["loss"] += loss.item()
                    sums["tokens"] += sum(learnt(row) for row in chosen)
        engine.train()
        sums = context.world.sums(sums)
        return math.exp(min(50.0, sums["loss"] / sums["tokens"]))

    # 3. Resume, or measure where it starts.
    state: dict[str, Any] = {}
    found = context.resume(load_engines({"engine": engine}, context.world))
    if found is not None:
        state, first = found.state, found.step
    else:
        state, first = {"perplexity_before": perplexity()}, 0
        context.metrics.log(0, total, "eval", {"perplexity": state["perplexity_before"]})

    def take(snapshot: Snapshot) -> None:
        save_engines(snapshot, {"engine": engine}, context.world)

    # 4. Train.
    for step in range(first, total):
        context.checkpoints.safe_point(step, take, state)
        context.reseed(step)
        micro_batches = batches.step(data.train, step)
        local = float(sum(learnt(row) for rows, real in micro_batches if real for row in rows))
        tokens = context.world.sums({"tokens": local})["tokens"]
        rate = engines.learning_rate(engine)
        losses: list[Tensor] = []

        def scaled_loss(
            rows: list[dict[str, Any]], real: bool, tokens: float = tokens, losses: list[Tensor] = losses
        ) -> Tensor:
            loss = loss_sum(rows) * real
            losses.append(loss.detach())
            return loss * (context.loss_scale / tokens)

        scaled = [partial(scaled_loss, *batch) for batch in micro_batches]
        norm = engines.optimizer_step(engine, checked(context.stop, scaled))
        loss = context.world.sums({"loss": torch.stack(losses).sum().item()})["loss"] / tokens
        values = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens}
        context.metrics.log(step + 1, total, "train", {**values, **engines.traffic([engine])})
    context.checkpoints.safe_point(total, take, state)

    # 5. Measure where it ends, and hand over.
    after = perplexity()
    context.metrics.log(total, total, "eval", {"perplexity": after})
    finish(context, total, {"": model}, {**state, "perplexity_after": after})
