"""DPO: learn from pairs which answer people preferred, without a reward model and without sampling.

Direct preference optimisation, arXiv 2305.18290; in place of the reward model and PPO.
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
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine, Sampling
from hpc_rlhf.train.stages.common import (
    EVALUATED,
    Batches,
    adapted,
    checked,
    finish,
    load_engines,
    pair_lengths,
    save_engines,
)
from hpc_rlhf.train.stages.sample_log import SampleLog

# Held-out prompts answered at the end by the model that training started from and by the trained one.
SHOWN = 16

Rows = list[dict[str, Any]]
MEASURED = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


class DpoModels:
    """The policy in training and its reference: the same model as it was before.

    Where only adapters are trained, the policy without them is the reference, and no second model is held.
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
        adapted(self.policy, spec, context.spec.seed)
        self.engine = engines.training_engine(LanguageModel(self.policy), configs[""], spec, spec.lr, total)
        self.ref_policy = self.policy if ref is None else ref
        self.ref = (
            self.engine
            if ref is None
            else engines.frozen_engine(LanguageModel(ref), configs["ref"], world.device)
        )

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, ``ref`` and ``ref_policy`` are the model as it was before training, dropout off."""
        if self.own_ref:
            yield
            return
        was_training = self.engine.training
        self.engine.eval()
        with lora.off(self.policy):
            yield
        self.engine.train(was_training)


def answer_log_probs(model: Any, rows: Rows, device: torch.device) -> Tensor:
    """Log-probabilities of whole answers: (2, pairs), of the chosen and of the rejected, float32, in nats."""
    answers = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    prompts = [row["prompt_ids"] for row in rows] * 2
    batch = Ragged.of([p + a for p, a in zip(prompts, answers, strict=True)], device)
    sizes = [len(answer) for answer in answers]
    log_probs, _ = model(batch.ids, batch.lengths, batch.tail(sizes))
    return ragged.pad(log_probs, sizes).sum(dim=1).view(2, len(rows))


def show(context: StageContext, models: DpoModels, rows: Rows, step: int) -> None:
    """Answer held-out prompts before and after training, and keep both. Collective."""
    if not rows:
        return
    tokenizer, limit = context.tokenizer, context.spec.data.max_answer_tokens

    def answers(policy: Any) -> list[str]:
        made = RolloutEngine(policy, context.world).generate(
            [row["prompt_ids"] for row in rows],
            None,
            limit,
            Sampling(greedy=True),
            tokenizer.eos_token_id,
            len(rows),
            context.stop.should_stop,
        )
        return [tokenizer.decode(answer, skip_special_tokens=True) for answer in made]

    before, after = list[str](), list[str]()
    with context.stop.cancellable(), models.as_reference():
        before = answers(models.ref_policy)
    with context.stop.cancellable():
        after = answers(models.policy)
    if context.world.is_main:
        SampleLog(context.files.samples, tokenizer).keep(
            [
                {"step": step, "kind": "final", "prompt": row["prompt"], "answer": tuned, "sft_answer": sft}
                for row, tuned, sft in zip(rows, after, before, strict=True)
            ]
        )


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
        """The reference's log-probabilities of both answers: (2, pairs)."""
        with torch.no_grad(), models.as_reference():
            return answer_log_probs(models.ref, rows, world.device)

    def compare(rows: Rows, ref: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the pairs' losses, and the sums of what is MEASURED."""
        log_probs = answer_log_probs(engine, rows, world.device)
        losses, chosen, rejected = preference_loss(
            log_probs[0], log_probs[1], ref[0], ref[1], spec.beta, spec.label_smoothing
        )
        measured = (losses.detach(), (chosen > rejected).float(), chosen - rejected, chosen, rejected)
        return losses.sum(), torch.stack(measured).sum(dim=1)

    def totals(seen: list[Tensor], pairs: int) -> dict[str, float]:
        sums = world.sums(dict(zip(MEASURED, torch.stack(seen).sum(dim=0).tolist(), strict=True)))
        return {name: sums[name] / pairs for name in MEASURED}

    def evaluate() -> Mapping[str, float | None]:
        """The same means over the held-out pairs; nothing where there are none."""
        rows = data.held_out
        count = min(len(rows), EVALUATED)
        if not count:
            return {"accuracy": None}
        engine.eval()
        seen = []
        with torch.no_grad():
            for pairs, real in Batches(context, "held out", pair_lengths(rows), budget).held_out(rows):
                context.stop.check("evaluation")
                seen.append(compare(pairs, reference(pairs))[1] * real)
        engine.train()
        return totals(seen, count)

    # 3. Resume.
    found = context.resume(load_engines({"engine": engine}, context.world))
    first = found.step if found else 0
    if world.is_main:
        keep_until(context.files.samples, first if found else -1)

    def take(snapshot: Snapshot) -> None:
        save_engines(snapshot, {"engine": engine}, context.world)

    # 4. Train.
    for step in range(first, total):
        context.checkpoints.safe_point(step, take, {})
        context.reseed(step)
        micro_batches = batches.step(data.train, step)
        refs = [reference(rows) for rows, _ in micro_batches]
        rate = engines.learning_rate(engine)
        seen: list[Tensor] = []

        def scaled_loss(rows: Rows, real: bool, ref: Tensor, seen: list[Tensor] = seen) -> Tensor:
            loss, measured = compare(rows, ref)
            seen.append(measured * real)
            return loss * (real * context.loss_scale / context.batch.global_)

        losses = [partial(scaled_loss, *batch, ref) for batch, ref in zip(micro_batches, refs, strict=True)]
        norm = engines.optimizer_step(engine, checked(context.stop, losses))
        values = {**totals(seen, context.batch.global_), "lr": rate, "grad_norm": norm}
        context.metrics.log(step + 1, total, "train", {**values, **engines.traffic([engine])})
    context.checkpoints.safe_point(total, take, {})

    # 5. Measure, show answers side by side, and hand over.
    after = evaluate()
    context.metrics.log(total, total, "eval", after)
    show(context, models, [data.held_out[i] for i in range(min(SHOWN, len(data.held_out)))], total)
    finish(context, total, {"": models.policy}, dict(after))
