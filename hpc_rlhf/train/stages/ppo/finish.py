"""The end of PPO: held-out responses beside the SFT model's, and the exported models."""

from __future__ import annotations

from typing import Any

from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.stages.common import commit, new_artifact, write_model
from hpc_rlhf.train.stages.ppo.models import PpoModels
from hpc_rlhf.train.stages.ppo.trainer import PpoTrainer
from hpc_rlhf.train.stages.sample_log import SampleLog, greedy_responses, held_out_prompts


def compare_with_ref(context: StageContext, trainer: PpoTrainer, held_out: Any, samples: SampleLog, step: int) -> None:
    """Answer held-out prompts with the SFT model and with the trained one, and log both. Collective."""
    rows = held_out_prompts(held_out)
    if not rows:
        return
    models = trainer.models
    trainer.backend.sync_weights(models.policy)
    scored: dict[str, list[tuple[str, float | None]]] = {}
    for name, backend in (("sft", RolloutEngine(models.ref_policy, context.world)), ("ppo", trainer.backend)):
        rollout = greedy_responses(context, backend, rows)
        scores = trainer.rewards.score(rollout.prompts, rollout.responses, {})
        scored[name] = [
            (samples.text(response), None if score is None else round(score, 4))
            for response, score in zip(rollout.responses, scores, strict=True)
        ]
    if context.world.is_main:
        samples.append(
            [
                {
                    "step": step, "kind": "final", "prompt": row["prompt"],
                    "answer": tuned[0], "reward": tuned[1], "sft_answer": sft[0], "sft_reward": sft[1],
                }
                for row, tuned, sft in zip(rows, scored["ppo"], scored["sft"], strict=True)
            ]
        )  # fmt: skip


def export_models(context: StageContext, models: PpoModels, step: int, metrics: dict[str, Any]) -> None:
    """Write the actor, and its moving average beside it, as the stage's artifact. Collective."""
    folder = new_artifact(context)
    with context.stop.cancellable():
        write_model(context, models.policy, folder)
        if models.ema:
            with models.ema.averaged_weights():  # a stop restores the weights before it saves
                write_model(context, models.policy, folder / context.files.ema_model.name)
    commit(context, folder, step, metrics)
