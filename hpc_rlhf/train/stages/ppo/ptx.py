"""The pretraining mixture of PPO-ptx (InstructGPT, arXiv 2203.02155, equation 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.tokenized import prepare_mixture, token_lengths
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.stages.common import Batches


class PtxStream:
    """Pretraining text: as many samples per optimizer step as PPO itself has.

    The position in the text follows from the engine's own count of optimizer steps, so a resumed run
    continues with the same text.
    """

    def __init__(self, context: StageContext, spec: PpoSpec) -> None:
        assert spec.ptx is not None
        self.context = context
        self.coefficient = spec.ptx_coef
        with context.stop.cancellable():
            self.rows = prepare_mixture(
                spec.ptx,
                f"stages.{context.stage}.ptx",
                context.spec,
                context.tokenizer,
                context.files.data,
                context.world,
                context.stop.should_stop,
            )
        lengths = token_lengths(self.rows, "prompt_ids", "chosen_ids")
        self.batches = Batches(context, "ptx", lengths, context.batch.micro * context.longest)

    def losses(self, engine: Any) -> list[Callable[[], Tensor]]:
        """The losses of the next optimizer step, scaled to be added to PPO's. Collective."""
        indices = self.batches.indices(engine.global_steps)
        tokens = sum(int(self.batches.lengths[i]) - 1 for i in indices)
        scale = self.coefficient * self.context.loss_factor / tokens

        def loss(micro_batch: list[int], real: bool) -> Tensor:
            rows = [self.rows[i] for i in micro_batch]
            batch = Ragged.of([row["prompt_ids"] + row["chosen_ids"] for row in rows], self.context.world.device)
            predicted = batch.tail([length - 1 for length in batch.lengths])
            log_prob: Tensor = engine(batch.ids, batch.lengths, predicted, summed=True)[0]
            return -log_prob * (scale * real)

        return [partial(loss, *batch) for batch in self.batches.plan(indices)]
