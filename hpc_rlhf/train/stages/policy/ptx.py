"""The pretraining mixture of PPO-ptx (InstructGPT, arXiv 2203.02155, equation 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.tokenized import prepare_mixture, token_lengths
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.stages.learner import RESPONSES, micro_batches, step_indices
from hpc_rlhf.train.stages.policy.trainer import Mixture


def pretraining_mixture(context: StageContext, spec: PolicySpec) -> Mixture:
    """Losses of pretraining text: as many samples per optimizer step as the stage itself has. Collective.

    The position in the text follows from the engine's own count of optimizer steps, so a resumed run
    continues with the same text.
    """
    assert spec.ptx is not None
    where, stop = f"stages.{context.stage}.ptx", context.stop
    with stop.cancellable():
        data = prepare_mixture(
            spec.ptx, where, context.spec, context.tokenizer, context.files.data, context.world, stop.should_stop
        )
    lengths = token_lengths(data, *RESPONSES)

    def losses(engine: Any, stats: dict[str, Tensor]) -> list[Callable[[], Tensor]]:
        indices = step_indices(context, "ptx", len(data), engine.global_steps)
        tokens = sum(int(lengths[i]) - 1 for i in indices)
        scale = spec.ptx_coef * context.loss_factor / tokens

        def loss(chosen: list[int], real: bool) -> Tensor:
            rows = [data[i] for i in chosen]
            batch = Ragged.of([row["prompt_ids"] + row["chosen_ids"] for row in rows], context.world.device)
            predicted = batch.tail([length - 1 for length in batch.lengths])
            log_prob: Tensor = engine(batch.ids, batch.lengths, predicted, summed=True)[0]
            stats["ptx_loss"] -= log_prob.detach() * real
            stats["ptx_tokens"] += len(predicted) * real
            return -log_prob * (scale * real)

        planned = micro_batches(context, lengths.__getitem__, indices, context.batch.micro * context.longest)
        return [partial(loss, *batch) for batch in planned]

    return losses
