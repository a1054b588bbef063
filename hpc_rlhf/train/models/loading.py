"""Loads transformers models from a hub id, a folder or a configuration, whole or sharded by ZeRO-3."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.spec.job import FromScratch, ModelRef
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.export import gathered
from hpc_rlhf.train.models.forward import hidden_states
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.world import World

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The architectures' names for dropout rates.
DROPOUT_FIELDS = (
    "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "classifier_dropout",
    "embd_pdrop", "resid_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip


def make_from_scratch(ref: FromScratch, tokenizer: Any, seed: int, folder: Path, world: World) -> None:
    """Write a newly initialized model once, so that all ranks and ZeRO stages start from the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make() -> None:
        if manifest.defect(folder) is None:
            return
        fields = dict(ref.from_scratch)
        kind = str(fields.pop("model_type"))
        ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        try:
            config = AutoConfig.for_model(kind, **{**fields, **ids})
            seeds.reseed(seed, "from scratch", kind)
            model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # architectures reject configurations with any exception
            raise HpcRlhfError(
                f"cannot create a {kind} model from this configuration ({type(error).__name__}: {error})",
                where="from_scratch",
                hint="use the field names of the architecture's configuration in transformers",
            ) from error
        model.save_pretrained(str(folder))
        manifest.write(folder, {"from_scratch": ref.from_scratch})

    world.on_main(make)


def _load(auto_class: Any, source: str, dtype: torch.dtype, dropout: float, **kwargs: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, **kwargs)
        for field in DROPOUT_FIELDS:
            if hasattr(config, field):
                setattr(config, field, dropout)
        if hasattr(config, "layerdrop"):
            config.layerdrop = 0.0
        return auto_class.from_pretrained(source, config=config, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise HpcRlhfError(
            f"the model could not be loaded ({str(error).splitlines()[0]})",
            where=source,
            hint="give a hub id that this node can reach or has cached, or a model's folder",
            exit_code=RUN_FAILED,
        ) from error


def load_causal(source: str, dtype: torch.dtype, dropout: float = 0.0) -> Any:
    """A causal language model.

    Raises:
        HpcRlhfError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, source, dtype, dropout)
    packed_attention.enable(model)
    return model


def check_fits(config: Any, tokenizer: Any, longest: int, source: str) -> None:
    """Refuse a model that is too small for the tokens.

    Raises:
        HpcRlhfError: its vocabulary or its longest sequence is too small.
    """
    if config.vocab_size < len(tokenizer):
        raise HpcRlhfError(
            f"the model has {config.vocab_size} tokens, but the actor's tokenizer has {len(tokenizer)}",
            where=source,
            hint="actor and reward model must share a tokenizer",
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise HpcRlhfError(
            f"the model takes {limit} tokens, but prompt and response may have {longest}",
            where=source,
            hint="lower data.max_prompt_tokens or data.max_answer_tokens",
        )


class RewardModel(nn.Module):
    """A language model's body with a linear head without bias: one value per token.

    It wraps transformers' sequence classification model with one label, so that its folder loads with
    ``AutoModelForSequenceClassification``.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Values (tokens,) of packed sequences.

        Args:
            ids: (tokens,), int64.
            lengths: tokens of each sequence.
        """
        hidden = hidden_states(self.classifier.base_model, ids, lengths)
        values: Tensor = self.classifier.score(hidden)[: len(ids)].squeeze(-1)
        return values


def load_reward(source: str, dtype: torch.dtype, seed: int | None, dropout: float = 0.0) -> RewardModel:
    """A reward model from any causal language model, or from a trained reward model.

    Args:
        seed: initializes a new head; None keeps the folder's head.

    Raises:
        HpcRlhfError: it cannot be loaded, or transformers has no variant of the architecture with a score head.
    """
    from transformers import AutoModelForSequenceClassification

    classifier = _load(AutoModelForSequenceClassification, source, dtype, dropout, num_labels=1)
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise HpcRlhfError("this architecture has no linear score head in transformers", where=source)
    if seed is not None:
        weight = classifier.score.weight
        with gathered([weight], to_change=True), torch.no_grad():
            generator = torch.Generator().manual_seed(seeds.derive(seed, "score head"))
            spread = 1 / math.sqrt(weight.shape[1] + 1)
            weight.copy_(torch.empty(weight.shape).normal_(0, spread, generator=generator))
    packed_attention.enable(classifier)
    return RewardModel(classifier)


def folder_or_id(ref: ModelRef, folder: Path) -> str:
    """Where to load a model from: what the spec names, or the folder that it was initialized in."""
    return str(folder) if isinstance(ref, FromScratch) else ref
