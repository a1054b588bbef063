"""Loads transformers models from a hub id, a folder or a configuration, whole or sharded by ZeRO-3."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.spec.job import FromScratch
from hpc_rlhf.train.models import dropout as dropouts
from hpc_rlhf.train.models import packed_attention, rotary, score_head
from hpc_rlhf.train.models.export import gathered, interruptible
from hpc_rlhf.train.models.language_model import RewardModel
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.stop_control import StopControl
from hpc_rlhf.train.runtime.world import World

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def exit_code_of(error: Exception, source: str) -> int:
    """Whether a model that cannot be loaded is the user's mistake: a folder whose content is wrong. The hub may answer
    the next attempt."""
    is_mistake = os.path.isabs(source) and getattr(error, "errno", None) is None
    return INPUT_WRONG if is_mistake else RUN_FAILED


def _load(auto_class: Any, source: str, dtype: torch.dtype, dropout: float, **kwargs: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, **kwargs)
        dropouts.set_rates(config, dropout)
        model = auto_class.from_pretrained(source, config=config, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise HpcRlhfError(
            f"the model could not be loaded ({str(error).splitlines()[0]})",
            where=source,
            hint="give a hub id that this node can reach or has cached, or a model's folder",
            exit_code=exit_code_of(error, source),
        ) from error
    if not dropout:
        dropouts.turn_off(model)
    rotary.separate(model)
    return model


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
    """Refuse a model whose vocabulary or longest sequence is too small for the tokens."""
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


def load_reward(source: str, dtype: torch.dtype, seed: int | None, dropout: float = 0.0) -> RewardModel:
    """A reward model from a causal or a reward model; ``seed`` initializes a new head, None keeps the source's.

    Raises:
        HpcRlhfError: it cannot be loaded, or transformers has no variant of the architecture with a score head.
    """
    from transformers import AutoModelForSequenceClassification

    classifier = _load(AutoModelForSequenceClassification, source, dtype, dropout, num_labels=1)
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise HpcRlhfError("this architecture has no linear score head in transformers", where=source)
    exact = score_head.stored(Path(source))
    if seed is not None:
        weight = classifier.score.weight
        with gathered([weight], to_change=True), torch.no_grad():
            generator = torch.Generator().manual_seed(seeds.derive(seed, "score head"))
            spread = 1 / math.sqrt(weight.shape[1] + 1)
            exact = torch.empty(weight.shape).normal_(0, spread, generator=generator)
            weight.copy_(exact)
    packed_attention.enable(classifier)
    return RewardModel(classifier, exact)


@contextmanager
def sharded_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Within it, transformers loads models in ZeRO-3 shards if the config says stage 3."""
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(copy.deepcopy(ds_config))  # transformers keeps only a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


@contextmanager
def loading(stop: StopControl, ds_config: dict[str, Any]) -> Iterator[None]:
    """``sharded_loading`` that ends early when the attempt is to stop. Collective; see ``StopControl.check``.

    A load that fails while this rank has to stop counts as cancelled: the files it needs may be going down
    with the node.

    Two kinds of loading are not interrupted; if they are killed, no training is lost. ZeRO-3 loads on all
    ranks together (13B in bf16 take 13 to 26 s at 1 to 2 GB/s) and stops before the next model. A download
    from a hub may take minutes; files that are complete are kept for the next attempt.
    """
    stop.check()

    def should_stop() -> bool:  # without a heartbeat, which would start the watchdog's clock
        return stop.flag.code > 0

    sharded = ds_config["zero_optimization"]["stage"] == 3
    try:
        with sharded_loading(ds_config), interruptible(bool if sharded else should_stop):
            yield
    except Exception:
        if not should_stop():
            raise
    stop.check()
