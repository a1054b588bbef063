"""The reward model: learn from pairs which response people preferred.

Step 2 of DeepSpeed-Chat (arXiv 2308.01320).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import RewardSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.reward import pairwise_loss
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.interruptible_loading import loading
from hpc_rlhf.train.models.loading import check_fits, load_reward
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.stages.common import (
    Batches,
    checked,
    finish,
    load_engines,
    pair_lengths,
    prepare_model,
    save_engines,
)


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, RewardSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = 2 * context.batch.micro * context.longest
    batches = Batches(context, "reward", pair_lengths(data.train), budget)

    # 2. Model.
    source = context.start_model(context.spec.models.reward or context.spec.models.actor)
    with loading(context.stop, context.ds_config):
        model = load_reward(source, context.dtype, context.spec.seed, spec.dropout)
    check_fits(model.classifier.config, context.tokenizer, context.longest, source)
    prepare_model(model.classifier, spec, context.spec.seed)
    engine = engines.training_engine(model, context.ds_config, spec, spec.lr, total)

    def compare(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, and scores of the chosen and the rejected responses: (pairs,) each."""
        responses = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        prompts = [row["prompt_ids"] for row in rows] * 2
        sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
        batch = Ragged.of(sequences, context.world.device)
        values = ragged.pad(engine(batch.ids, batch.lengths), batch.lengths).chunk(2)
        ids = ragged.pad(batch.ids, batch.lengths).chunk(2)
        return pairwise_loss(*values, *ids, *ragged.mask(batch.lengths, batch.ids.device).chunk(2))

    def accuracy() -> float | None:
        """On the held-out pairs; None if there are none."""
        rows = data.held_out
        if not len(rows):
            return None
        engine.eval()
        sums = {"right": 0.0, "pairs": 0.0}
        with torch.no_grad():
            for pairs, real in Batches(context, "held out", pair_lengths(rows), budget).held_out(rows):
                context.stop.check("evaluation")
                _, chosen, rejected = compare(pairs)
                if real:
                    sums["right"] += (chosen > rejected).sum().item()
                    sums["pairs"] += len(pairs)
        engine.train()
        sums = context.world.sums(sums)
        return sums["right"] / sums["pairs"]

    # 3. Resume.
    checkpoint = context.resume(load_engines({"engine": engine}, context.world))
    first = checkpoint.step if checkpoint else 0

    def save(snapshot: Snapshot) -> None:
        save_engines(snapshot, {"engine": engine}, context.world)

    # 4. Train.
    for step in range(first, total):
        context.checkpoints.safe_point(step, save, {})
        context.reseed(step)
        micro_batches = batches.step(data.train, step)
        rate = engines.learning_rate(engine)
        measured: list[Tensor] = []

        def scaled_loss(rows: list[dict[str, Any]], real: bool, measured: list[Tensor] = measured) -> Tensor:
            losses, chosen, rejected = compare(rows)
            numbers = (losses.sum(), (chosen > rejected).sum(), (chosen - rejected).sum())
            measured.append(torch.stack(numbers).detach() * real)
            return losses.sum() * (real * context.loss_factor / context.batch.global_)

        scaled = [partial(scaled_loss, *batch) for batch in micro_batches]
        result = engines.optimizer_step(engine, checked(context.stop, scaled))
        names = ("loss", "accuracy", "margin")
        sums = context.world.sums(dict(zip(names, torch.stack(measured).sum(dim=0).tolist(), strict=True)))
        means = {name: sums[name] / context.batch.global_ for name in names}
        values = {**means, "lr": rate, **result.metrics, **engines.traffic([engine])}
        context.metrics.log(step + 1, total, "train", values)
    context.checkpoints.safe_point(total, save, {})

    # 5. Evaluate, and write the artifact.
    after = accuracy()
    context.metrics.log(total, total, "eval", {"accuracy": after})
    finish(context, total, {"": model.classifier}, {"accuracy": after})
