"""Arguments of vLLM's engine and of its sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.rollout.backend import Sampling


def engine_arguments(spec: RolloutSpec, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for an engine that takes and returns tokens.

    Args:
        folder: with the model's configuration.
    """
    of_spec: dict[str, Any] = {"enforce_eager": not torch.cuda.is_available(), **spec.args}
    if spec.max_num_seqs is not None:
        of_spec["max_num_seqs"] = spec.max_num_seqs
    if spec.tensor_parallel > 1:
        of_spec["distributed_executor_backend"] = "mp"
    return {
        **of_spec,
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel_size": spec.tensor_parallel,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "trust_remote_code": False,
        "seed": 0,
    }


def sampling_arguments(sampling: Sampling, max_tokens: int, eos_id: int) -> Mapping[str, Any]:
    """Arguments of ``vllm.SamplingParams`` for responses of at most ``max_tokens`` tokens, EOS included."""
    return {
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p,
        "top_k": 0 if sampling.greedy else sampling.top_k,
        "max_tokens": max_tokens,
        "stop_token_ids": [eos_id],
    }
