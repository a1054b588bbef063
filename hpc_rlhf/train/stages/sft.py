"""Supervised fine-tuning: learn the chosen responses by next-token prediction.

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
from hpc_rlhf.train.stages.common import Batches, checked, finish, load_engines, prepare_model, save_engines


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, SftSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = context.batch.micro * context.longest
    batches = Batches(context, "sft", token_lengths(data.train, "prompt_ids", "chosen_ids"), budget)

    def target_tokens(row: dict[str, Any]) -> int:
        """Tokens at a row's end to learn; its first token cannot be predicted."""
        response, whole = len(row["chosen_ids"]), len(row["prompt_ids"]) + len(row["chosen_ids"])
        return min(response if spec.answer_only else whole, whole - 1)

    # 2. Model.
    source = context.start_model(context.spec.models.actor)
    with loading(context.stop, context.ds_config):
        model = load_causal(source, context.dtype, spec.dropout)
    check_fits(model.config, context.tokenizer, context.longest, source)
    prepare_model(model, spec, context.spec.seed)
    engine = engines.training_engine(LanguageModel(model), context.ds_config, spec, spec.lr, total)

    def loss_sum(rows: list[dict[str, Any]]) -> Tensor:
        batch = Ragged.of([row["prompt_ids"] + row["chosen_ids"] for row in rows], context.world.device)
        predicted = batch.tail([target_tokens(row) for row in rows])
        log_prob: Tensor = engine(batch.ids, batch.lengths, predicted, summed=True)[0]
        return -log_prob

    def perplexity() -> float | None:
        """On the held-out samples; None if there are none."""
        rows = data.held_out
        if not len(rows):
            return None
        engine.eval()
        sums = {"loss": 0.0, "tokens": 0.0}
        lengths = token_lengths(rows, "prompt_ids", "chosen_ids")
        with torch.no_grad():
            for batch, real in Batches(context, "held out", lengths, budget).held_out(rows):
                context.stop.check("evaluation")
                loss = loss_sum(batch)
                if real:
                    sums["loss"] += loss.item()
                    sums["tokens"] += sum(target_tokens(row) for row in batch)
        engine.train()
        sums = context.world.sums(sums)
        return math.exp(min(50.0, sums["loss"] / sums["tokens"]))

    # 3. Resume, or evaluate the start.
    state: dict[str, Any] = {}
    checkpoint = context.resume(load_engines({"engine": engine}, context.world))
    if checkpoint is not None:
        state, first = checkpoint.state, checkpoint.step
    else:
        state, first = {"perplexity_before": perplexity()}, 0
        context.metrics.log(0, total, "eval", {"perplexity": state["perplexity_before"]})

    def save(snapshot: Snapshot) -> None:
        save_engines(snapshot, {"engine": engine}, context.world)

    # 4. Train.
    for step in range(first, total):
        context.checkpoints.safe_point(step, save, state)
        context.reseed(step)
        micro_batches = batches.step(data.train, step)
        local = float(sum(target_tokens(row) for rows, real in micro_batches if real for row in rows))
        tokens = context.world.sums({"tokens": local})["tokens"]
        rate = engines.learning_rate(engine)
        losses: list[Tensor] = []

        def scaled_loss(
            rows: list[dict[str, Any]], real: bool, tokens: float = tokens, losses: list[Tensor] = losses
        ) -> Tensor:
            loss = loss_sum(rows) * real
            losses.append(loss.detach())
            return loss * (context.loss_factor / tokens)

        scaled = [partial(scaled_loss, *batch) for batch in micro_batches]
        result = engines.optimizer_step(engine, checked(context.stop, scaled))
        loss = context.world.sums({"loss": torch.stack(losses).sum().item()})["loss"] / tokens
        values = {"loss": loss, "lr": rate, "tokens": tokens, **result.metrics}
        context.metrics.log(step + 1, total, "train", {**values, **engines.traffic([engine])})
    context.checkpoints.safe_point(total, save, state)

    # 5. Evaluate, and write the artifact.
    after = perplexity()
    context.metrics.log(total, total, "eval", {"perplexity": after})
    finish(context, total, {"": model}, {**state, "perplexity_after": after})
