"""Supervised fine-tuning: learn the chosen responses by next-token prediction.

Step 1 of DeepSpeed-Chat (arXiv 2308.01320) and InstructGPT (arXiv 2203.02155).
"""

from __future__ import annotations

import math

from torch import Tensor

from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.models import agreement
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import check_fits, load_causal, loading
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.stages.common import finish, prepare_model
from hpc_rlhf.train.stages.learner import RESPONSES, Learner, Row


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, SftSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = context.batch.micro * context.longest

    # 2. Model.
    source = context.start_model(context.spec.models.actor)
    with loading(context.stop, context.ds_config):
        model = load_causal(source, context.dtype, spec.dropout)
    check_fits(model.config, context.tokenizer, context.longest, source)
    prepare_model(model, spec, context.spec.seed)
    engine = engines.training_engine(LanguageModel(model), context.ds_config, spec, spec.lr, total)
    agreement.verify(engine, context.world, source, spec.dropout)

    # 3. Loss: the negative log-probability of a row's last tokens.
    def target_tokens(row: Row) -> int:
        """How many tokens at a row's end are learned; its first token cannot be predicted."""
        response, whole = len(row["chosen_ids"]), len(row["prompt_ids"]) + len(row["chosen_ids"])
        return min(response if spec.answer_only else whole, whole - 1)

    def measure(rows: list[Row]) -> tuple[Tensor, Tensor]:
        batch = Ragged.of([row["prompt_ids"] + row["chosen_ids"] for row in rows], context.world.device)
        predicted = batch.tail([target_tokens(row) for row in rows])
        loss = -engine(batch.ids, batch.lengths, predicted, summed=True)[0]
        return loss, loss.detach().unsqueeze(0)

    learner = Learner(
        context, engine, data, total, RESPONSES, budget, ("loss",), measure,
        learned_tokens=target_tokens,
        derived=lambda means: {"perplexity": math.exp(min(50.0, means["loss"]))},
    )  # fmt: skip

    # 4. Resume, or evaluate the start.
    checkpoint = context.resume(learner.load)
    if checkpoint is not None:
        state, first = {"perplexity_before": checkpoint.state["perplexity_before"]}, checkpoint.step
    else:
        state, first = {"perplexity_before": learner.held_out.evaluate(0)["perplexity"]}, 0

    # 5. Train, evaluate, and write the artifact.
    learner.train(first, state)
    metrics = learner.held_out.finish()
    metrics = {**state, "perplexity_after": metrics.pop("perplexity"), **metrics}
    finish(context, total, {"": model}, metrics, learner.held_out.handed_on())
