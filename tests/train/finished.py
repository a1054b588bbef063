"""A run whose stages are done without training: models with random weights."""

from __future__ import annotations

import torch

from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.train.data import sources
from hpc_rlhf.train.models.tokenizers import train_bpe
from tests.train import tiny


def as_if_trained(run: RunDir, spec: JobSpec) -> None:
    """Write the models that the stages of a tiny spec would produce; the moving average is the SFT model."""
    tokenizer = train_bpe(sources.texts(spec), 300)
    size = {"vocab_size": 300, "max_position_embeddings": 64}
    sft, changed = tiny.causal("llama", 0, **size), tiny.causal("llama", 0, **size)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    models = {
        run.stage("sft").model: sft,
        run.stage("reward").model: tiny.classifier("llama", 1, **size),
        run.stage("ppo").model: changed,
        run.stage("ppo").ema_model: sft,
        run.stage("grpo").model: changed,
        run.stage("dpo").model: changed,
    }
    for folder, model in models.items():
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    for stage in ("sft", "reward", "ppo", "grpo", "dpo"):
        manifest.write(run.stage(stage).model, {"stage": stage, "step": 1, "seconds": 1.0, "metrics": {}})
