"""The reward model: learn from pairs of responses which one people prefer.

Step 2 of DeepSpeed-Chat (arXiv 2308.01320).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_rlhf.spec.stages import RewardSpec
from hpc_rlhf.train import ragged
from hpc_rlhf.train.algorithms.reward import pairwise_loss, preferred, ranking_loss
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.sampler import total_steps
from hpc_rlhf.train.models import agreement
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.loading import check_fits, load_reward, loading
from hpc_rlhf.train.stages.common import finish, prepare_model, start_actor
from hpc_rlhf.train.stages.learner import PAIRS, Learner, Row, pack_pairs


def run(context: StageContext) -> None:
    spec = context.stage_spec
    assert isinstance(spec, RewardSpec)

    # 1. Data.
    data = context.data()
    total = total_steps(len(data.train), spec.epochs, context.batch.global_, spec.max_steps)
    budget = 2 * context.batch.micro * context.longest

    # 2. Model.
    own = context.spec.models.reward
    source = start_actor(context) if own is None else context.start_model(own)
    with loading(context.stop, context.ds_config):
        model = load_reward(source, context.dtype, context.spec.seed, spec.dropout)
    check_fits(model.classifier.config, context.tokenizer, context.longest, source)
    prepare_model(model.classifier, spec, context.spec.seed)
    engine = engines.training_engine(model, context.ds_config, spec, spec.lr, total)
    agreement.verify(engine, context.world, source, spec.dropout)

    # 3. Loss: the chosen response of a pair should have the higher score.
    def measure(rows: list[Row]) -> tuple[Tensor, Tensor]:
        batch, _ = pack_pairs(rows, context.world.device)
        values = ragged.pad(engine(batch.ids, batch.lengths), batch.lengths).chunk(2)
        ids = ragged.pad(batch.ids, batch.lengths).chunk(2)
        mask = ragged.mask(batch.lengths, batch.ids.device).chunk(2)
        losses, chosen, rejected = pairwise_loss(*values, *ids, *mask)
        if spec.loss == "last":
            margins = torch.tensor([row["margin"] for row in rows], device=chosen.device) if spec.margins else None
            losses = ranking_loss(chosen, rejected, margins)
        sums = (losses, preferred(chosen, rejected), chosen - rejected, chosen)
        return losses.sum(), torch.stack(sums).sum(dim=1).detach()

    names = ("loss", "accuracy", "margin", "chosen_score")
    learner = Learner(context, engine, data, total, PAIRS, budget, names, measure)

    # 4. Resume, and train.
    checkpoint = context.resume(learner.load)
    learner.train(checkpoint.step if checkpoint else 0, {})

    # 5. Evaluate, and write the artifact.
    metrics = learner.held_out.finish()
    if spec.center_scores and (score := metrics.get("chosen_score")) is not None:
        model.offset += score
    finish(context, total, {"": model.classifier}, metrics, learner.held_out.handed_on())
