"""What DPO and KTO have in common: the policy in training and its reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpc_rlhf.spec.training import PreferenceSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.models import agreement, lora
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import check_fits, load_causal, loading
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.stages.common import finish, prepare_model, start_actor
from hpc_rlhf.train.stages.learner import Learner, evaluated_rows
from hpc_rlhf.train.stages.sample_log import HELD_OUT_PROMPTS, SampleLog


class ReferredModels:
    """The policy in training and its reference, which is the same model before training.

    If only adapters are trained, the policy without them is the reference, and there is no second model.
    """

    def __init__(self, context: StageContext, spec: PreferenceSpec, total: int) -> None:
        configs, world = context.ds_configs, context.world
        self.context = context
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
        with self.evaluating(), lora.off(self.policy):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it, the policy's dropout is off."""
        was_training = self.engine.training
        self.engine.eval()
        yield
        self.engine.train(was_training)

    def train(self, learner: Learner) -> None:
        """Resume or begin, train, evaluate, compare responses with those before training, and write the artifact."""
        context, total = self.context, learner.total
        checkpoint = context.resume(learner.load)
        samples = SampleLog(context, checkpoint)
        learner.train(checkpoint.step if checkpoint else 0, {})
        metrics = learner.held_out.finish()
        held_out = learner.data.held_out
        rows = [held_out[i] for i in evaluated_rows(len(held_out), context.spec.seed, HELD_OUT_PROMPTS)]
        if rows:
            with self.as_reference():
                before = samples.answers(RolloutEngine(self.ref_policy, context.world), rows)
            with learner.held_out.handed_on():
                after = samples.answers(RolloutEngine(self.policy, context.world), rows)
            samples.append_final(total, rows, after, before)
        finish(context, total, {"": self.policy}, metrics, learner.held_out.handed_on())
