"""DPO: learn from pairs of responses which one people prefer, without a reward model or sampling.

Direct preference optimization (arXiv 2305.18290) replaces the reward model and PPO.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import DpoSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.dpo import preference_loss
from hpc_rlhf.train.algorithms.reward import preferred
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.models import agreement, lora
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import check_fits, load_causal, loading
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.stages.common import finish, prepare_model, start_actor
from hpc_rlhf.train.stages.learner import PAIRS, Learner, Row, evaluated_rows, pack_pairs
from hpc_rlhf.train.stages.sample_log import HELD_OUT_PROMPTS, SampleLog

METRICS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


class DpoModels:
    """The policy in training and its reference, which is the same model before training.

    If only adapters are trained, the policy without them is the reference, and there is no second model.
    """

    def __init__(self, context: StageContext, spec: DpoSpec, total: int) -> None:
        configs, world = context.ds_configs, context.world
        source = start_actor(context)
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
        agreement.verify(self.engine, world, source, spec.dropout)
        if ref is not None:
            agreement.verify(self.ref, world, source)

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


def run(context: StageContext) -> None:
    spec, world = context.stage_spec, context.world
    assert isinstance(spec, DpoSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = 2 * context.batch.micro * context.longest

    # 2. The policy and its reference.
    models = DpoModels(context, spec, total)

    def log_probs(model: Any, rows: list[Row]) -> Tensor:
        """Log-probabilities of whole responses: (2, pairs), chosen and rejected, float32, in nats."""
        batch, sizes = pack_pairs(rows, world.device)
        flat, _ = model(batch.ids, batch.lengths, batch.tail(sizes))
        return ragged.pad(flat, sizes).sum(dim=1).view(2, len(rows))

    def reference(rows: list[Row]) -> tuple[Tensor]:
        with torch.no_grad(), models.as_reference():
            return (log_probs(models.ref, rows),)

    # 3. Loss.
    def measure(rows: list[Row], ref: Tensor) -> tuple[Tensor, Tensor]:
        policy = log_probs(models.engine, rows)
        losses, chosen, rejected = preference_loss(
            policy[0], policy[1], ref[0], ref[1], spec.beta, spec.label_smoothing
        )
        sums = (losses.detach(), preferred(chosen, rejected), chosen - rejected, chosen, rejected)
        return losses.sum(), torch.stack(sums).sum(dim=1)

    learner = Learner(context, models.engine, data, total, PAIRS, budget, METRICS, measure, reference)

    # 4. Resume, and train.
    checkpoint = context.resume(learner.load)
    samples = SampleLog(context, checkpoint)
    learner.train(checkpoint.step if checkpoint else 0, {})

    # 5. Evaluate, compare responses with those before training, and write the artifact.
    metrics = learner.held_out.finish()
    rows = [data.held_out[i] for i in evaluated_rows(len(data.held_out), context.spec.seed, HELD_OUT_PROMPTS)]
    if rows:
        with models.as_reference():
            before = samples.answers(RolloutEngine(models.ref_policy, world), rows)
        with learner.held_out.handed_on():
            after = samples.answers(RolloutEngine(models.policy, world), rows)
        samples.append_final(total, rows, after, before)
    finish(context, total, {"": models.policy}, metrics, learner.held_out.handed_on())
