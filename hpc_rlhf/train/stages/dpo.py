"""DPO: learn from pairs which response people preferred, without a reward model and without sampling.

Direct preference optimization (arXiv 2305.18290) replaces the reward model and PPO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import DpoSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.dpo import preference_loss
from hpc_rlhf.train.checkpoint.snapshot import Snapshot
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.metrics import keep_until
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models import lora
from hpc_rlhf.train.models.interruptible_loading import loading
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import check_fits, load_causal
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.stages.common import (
    EVALUATED,
    Batches,
    checked,
    finish,
    load_engines,
    pair_lengths,
    prepare_model,
    save_engines,
)
from hpc_rlhf.train.stages.sample_log import SampleLog, greedy_responses, held_out_prompts

Rows = list[dict[str, Any]]
METRICS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


class DpoModels:
    """The policy in training and its reference, which is the same model before training.

    If only adapters are trained, the policy without them is the reference, and there is no second model.
    """

    def __init__(self, context: StageContext, spec: DpoSpec, total: int) -> None:
        configs, world = context.ds_configs, context.world
        source = (
            str(context.run.stage("sft").model)
            if "sft" in context.spec.needs("dpo")
            else context.start_model(context.spec.models.actor)
        )
        self.own_ref = spec.lora is None or not spec.lora.only
        with loading(context.stop, configs[""]):
            self.policy = load_causal(source, context.dtype, spec.dropout)
        with loading(context.stop, configs["ref"]):
            ref = load_causal(source, context.dtype) if self.own_ref else None
        check_fits(self.policy.config, context.tokenizer, context.longest, source)
        prepare_model(self.policy, spec, context.spec.seed)
        self.engine = engines.training_engine(LanguageModel(self.policy), configs[""], spec, spec.lr, total)
        self.ref_policy = self.policy if ref is None else ref
        self.ref = (
            self.engine if ref is None else engines.frozen_engine(LanguageModel(ref), configs["ref"], world.device)
        )

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, ``ref`` and ``ref_policy`` are the model before training, with dropout off."""
        if self.own_ref:
            yield
            return
        was_training = self.engine.training
        self.engine.eval()
        with lora.off(self.policy):
            yield
        self.engine.train(was_training)


def response_log_probs(model: Any, rows: Rows, device: torch.device) -> Tensor:
    """Log-probabilities of whole responses: (2, pairs), chosen and rejected, float32, in nats."""
    responses = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    prompts = [row["prompt_ids"] for row in rows] * 2
    batch = Ragged.of([p + r for p, r in zip(prompts, responses, strict=True)], device)
    sizes = [len(response) for response in responses]
    log_probs, _ = model(batch.ids, batch.lengths, batch.tail(sizes))
    return ragged.pad(log_probs, sizes).sum(dim=1).view(2, len(rows))


def compare_with_ref(context: StageContext, models: DpoModels, rows: Rows, step: int) -> None:
    """Answer held-out prompts before and after training, and log both. Collective."""
    if not rows:
        return
    with models.as_reference():
        before = greedy_responses(context, RolloutEngine(models.ref_policy, context.world), rows)
    after = greedy_responses(context, RolloutEngine(models.policy, context.world), rows)
    if context.world.is_main:
        samples = SampleLog(context.files.samples, context.tokenizer)
        samples.append(
            [
                {
                    "step": step, "kind": "final", "prompt": row["prompt"],
                    "answer": samples.text(tuned), "sft_answer": samples.text(sft),
                }
                for row, tuned, sft in zip(rows, after.responses, before.responses, strict=True)
            ]
        )  # fmt: skip


def run(context: StageContext) -> None:
    spec, world = context.stage_spec, context.world
    assert isinstance(spec, DpoSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = 2 * context.batch.micro * context.longest
    batches = Batches(context, "dpo", pair_lengths(data.train), budget)

    # 2. The policy and its reference.
    models = DpoModels(context, spec, total)
    engine = models.engine

    def reference(rows: Rows) -> Tensor:
        """The reference's log-probabilities of both responses: (2, pairs)."""
        with torch.no_grad(), models.as_reference():
            return response_log_probs(models.ref, rows, world.device)

    def compare(rows: Rows, ref: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the pairs' losses, and the sums of the METRICS."""
        log_probs = response_log_probs(engine, rows, world.device)
        losses, chosen, rejected = preference_loss(
            log_probs[0], log_probs[1], ref[0], ref[1], spec.beta, spec.label_smoothing
        )
        measured = (losses.detach(), (chosen > rejected).float(), chosen - rejected, chosen, rejected)
        return losses.sum(), torch.stack(measured).sum(dim=1)

    def means(measured: list[Tensor], pairs: int) -> dict[str, float]:
        sums = world.sums(dict(zip(METRICS, torch.stack(measured).sum(dim=0).tolist(), strict=True)))
        return {name: sums[name] / pairs for name in METRICS}

    def evaluate() -> Mapping[str, float | None]:
        """The same means over the held-out pairs, if there are any."""
        rows = data.held_out
        count = min(len(rows), EVALUATED)
        if not count:
            return {"accuracy": None}
        engine.eval()
        measured = []
        with torch.no_grad():
            for pairs, real in Batches(context, "held out", pair_lengths(rows), budget).held_out(rows):
                context.stop.check("evaluation")
                measured.append(compare(pairs, reference(pairs))[1] * real)
        engine.train()
        return means(measured, count)

    # 3. Resume.
    checkpoint = context.resume(load_engines({"engine": engine}, context.world))
    first = checkpoint.step if checkpoint else 0
    if world.is_main:
        keep_until(context.files.samples, first if checkpoint else -1)

    def save(snapshot: Snapshot) -> None:
        save_engines(snapshot, {"engine": engine}, context.world)

    # 4. Train.
    for step in range(first, total):
        context.checkpoints.safe_point(step, save, {})
        context.reseed(step)
        micro_batches = batches.step(data.train, step)
        refs = [reference(rows) for rows, _ in micro_batches]
        rate = engines.learning_rate(engine)
        measured: list[Tensor] = []

        def scaled_loss(rows: Rows, real: bool, ref: Tensor, measured: list[Tensor] = measured) -> Tensor:
            loss, sums = compare(rows, ref)
            measured.append(sums * real)
            return loss * (real * context.loss_factor / context.batch.global_)

        losses = [partial(scaled_loss, *batch, ref) for batch, ref in zip(micro_batches, refs, strict=True)]
        result = engines.optimizer_step(engine, checked(context.stop, losses))
        values = {**means(measured, context.batch.global_), "lr": rate, **result.metrics}
        context.metrics.log(step + 1, total, "train", {**values, **engines.traffic([engine])})
    context.checkpoints.safe_point(total, save, {})

    # 5. Evaluate, compare responses with those before training, and write the artifact.
    after = evaluate()
    context.metrics.log(total, total, "eval", after)
    compare_with_ref(context, models, held_out_prompts(data.held_out), total)
    finish(context, total, {"": models.policy}, dict(after))
