"""The pretraining mixture of PPO-ptx (InstructGPT, arXiv 2203.02155, equation 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.train.algorithms.logprobs import next_token_loss_sum
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data import sources
from hpc_rlhf.train.data.sampler import micro_batches, sample_at
from hpc_rlhf.train.data.tokenized import TokenBatch, encode_sample, pad_right
from hpc_rlhf.train.models.load import call, positions


class PtxStream:
    """Pretraining text in as many micro-batches an optimizer step as PPO itself has.

    Where it stands in the text follows from the engine's own count of optimizer steps, so a resumed
    run goes on with the same text.
    """

    def __init__(self, context: StageContext, spec: PpoSpec) -> None:
        assert spec.ptx is not None
        self.context = context
        self.coefficient = spec.ptx_coef
        encoded = (
            encode_sample(sample, context.tokenizer, context.spec, "sft")
            for sample in sources.read(spec.ptx, context.spec.seed)
        )
        self.rows = [row for row in encoded if row is not None]
        if not self.rows:
            raise HpcRlhfError("there is no text in it", where="stages.ppo.ptx", exit_code=RUN_FAILED)

    def losses(self, engine: Any) -> list[Callable[[], Tensor]]:
        """The losses of the next optimizer step, scaled to be added to PPO's. Collective."""
        context = self.context
        world, seed = context.world, context.spec.seed
        blocks = micro_batches(
            engine.global_steps, context.micro, context.accumulation, world.rank, world.size
        )
        batches = []
        for block in blocks:
            rows = [self.rows[sample_at(p, len(self.rows), seed, "ptx")] for p in block]
            prompts, answers = [row["prompt_ids"] for row in rows], [row["chosen_ids"] for row in rows]
            batches.append(pad_right(prompts, answers, context.tokenizer.pad_token_id).to(world.device))
        tokens = world.sums({"tokens": float(sum(batch.mask[:, 1:].sum().item() for batch in batches))})[
            "tokens"
        ]
        scale = self.coefficient * context.loss_scale / tokens

        def loss(batch: TokenBatch) -> Tensor:
            logits = call(engine, batch.input_ids, batch.mask, positions(batch.mask)).logits
            return next_token_loss_sum(logits, batch.input_ids, batch.mask) * scale

        return [partial(loss, batch) for batch in batches]
