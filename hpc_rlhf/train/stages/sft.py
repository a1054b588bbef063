"""Supervised fine-tuning: learn the chosen responses by next-token prediction.

Step 1 of DeepSpeed-Chat (arXiv 2308.01320) and InstructGPT (arXiv 2203.02155).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from hpc_rlhf.spec.sizes import EVALUATED_ROWS
from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.data.tokenized import learned_tokens
from hpc_rlhf.train.models.loading import check_fits, load_causal, loading
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.stages.common import finish, language_engine, prepare_model, start_actor
from hpc_rlhf.train.stages.learner import RESPONSES, Learner, Row


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, SftSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = context.batch.micro * context.longest

    # 2. Model.
    source = start_actor(context)
    whole = context.world.dims.pipeline > 1
    with loading(context.stop, context.ds_config, whole):
        model = load_causal(source, None if whole else context.dtype, spec.dropout)
    check_fits(model.config, context.tokenizer, context.longest, source)
    prepare_model(model, spec, context.spec.seed)
    engine, forward = language_engine(context, model, spec, spec.lr, total, source)

    # 3. Loss: the negative log-probability of a row's last tokens.
    answer_tokens = partial(learned_tokens, answer_only=True)
    learned = partial(learned_tokens, answer_only=spec.answer_only)

    def loss_of(last: Callable[[Row], int], rows: list[Row]) -> tuple[Tensor, Tensor]:
        batch = Ragged.of([row["prompt_ids"] + row["chosen_ids"] for row in rows], context.world.device)
        loss = -forward(batch.ids, batch.lengths, batch.tail([last(row) for row in rows]), summed=True)[0]
        return loss, loss.detach().unsqueeze(0)

    def perplexity(means: dict[str, float]) -> dict[str, float]:
        """Of the held-out responses, whatever is learned."""
        if not spec.answer_only:
            means = learner.held_out_means(partial(loss_of, answer_tokens), answer_tokens)
        return {"perplexity": math.exp(min(means["loss"], 50.0))}

    learner = Learner(
        context, engine, data, total, RESPONSES, budget, ("loss",), partial(loss_of, learned),
        learned_tokens=learned, derived=perplexity,
    )  # fmt: skip

    # 4. Resume, or evaluate the start.
    checkpoint = context.resume(learner.load)
    if checkpoint is None:
        before, first = learner.held_out.evaluate(0)["perplexity"], 0
    else:
        # Earlier versions measured the perplexity of what is learned, and of the first rows.
        same = checkpoint.state.get("perplexity_of") == "responses"
        same = same or (spec.answer_only and len(data.held_out) <= EVALUATED_ROWS)
        before, first = checkpoint.state["perplexity_before"] if same else None, checkpoint.step

    # 5. Train, evaluate, and write the artifact.
    learner.train(first, {"perplexity_before": before, "perplexity_of": "responses"})
    metrics = learner.held_out.finish()
    metrics = {"perplexity_before": before, "perplexity_after": metrics.pop("perplexity"), **metrics}
    finish(context, total, {"": model}, metrics, learner.held_out.handed_on())
