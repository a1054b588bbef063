"""Loads transformers models from a hub id, a folder or a configuration, whole or sharded by ZeRO-3."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.spec import model_files
from hpc_rlhf.spec.job import FromScratch
from hpc_rlhf.train.models import architectures, packed_attention, part_loading, rotary, score_head
from hpc_rlhf.train.models import dropout as dropouts
from hpc_rlhf.train.models.export import gathered, interruptible
from hpc_rlhf.train.models.language_model import RewardModel
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.stop_control import StopControl
from hpc_rlhf.train.runtime.world import World

# Ranks that share the layers of the models that are loaded.
_ways: ContextVar[int] = ContextVar("ways", default=1)
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
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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


def _load(
    class_of: Callable[[Any, str], Any], source: str, dtype: torch.dtype | None, dropout: float,
    labels: int | None = None,
) -> tuple[Any, list[str]]:  # fmt: skip
    """A model, and the names of its parameters that the files do not have.

    Args:
        class_of: given a text configuration and the source, the class to load.
        dtype: None keeps that of the files.
        labels: outputs of a score head.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if problem := model_files.untrainable(whole.to_dict()):
            raise HpcRlhfError(problem[0], where=source, hint=problem[1])
        where = model_files.folder(source)
        config = architectures.text_config(whole, where is None or model_files.has_output_head(where))
        dropouts.set_rates(config, dropout)
        renamed: dict[str, str] = {}
        kept = None
        if labels is not None:
            config.num_labels, renamed = labels, dict(architectures.OTHER_HEADS)
            if kept := _kept_head(source):
                renamed[rf"^{re.escape(kept.name)}\."] = "score."
        model_class = class_of(config, source)
        renamed |= architectures.renamed_weights(whole, model_class)
        model, info = None, {"unexpected_keys": [], "missing_keys": [score_head.WEIGHT] if kept is None else []}
        if (ways := _ways.get()) > 1 and dtype is not None:
            model = part_loading.load(model_class, config, source, dtype, ways)
        if model is None:
            model, info = model_class.from_pretrained(
                source, config=config, dtype=dtype or "auto", key_mapping=renamed, output_loading_info=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise HpcRlhfError(
            f"the model could not be loaded ({str(error).splitlines()[0]})",
            where=source,
            hint="give a hub id that this node can reach or has cached, or a model's folder",
            exit_code=exit_code_of(error, source),
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise HpcRlhfError("its weights do not have the sizes that its config.json says", where=source) from error
    if not dropout:
        dropouts.turn_off(model)
    rotary.separate(model)
    unread = sorted(name for name in info["unexpected_keys"] if model_files.HEAD.match(name))
    if labels is not None and kept is None and unread:
        what = f"its score head is not one linear layer without bias ({', '.join(unread)})"
        raise HpcRlhfError(what, where=source, hint=model_files.HEADS)
    # transformers would write them under their old names.
    conversions = getattr(model, "_weight_conversions", [])
    model._weight_conversions = [each for each in conversions if not set(each.source_patterns) & set(renamed)]
    return model, [name for name, _ in model.named_parameters() if name in info["missing_keys"]]


def load_causal(source: str, dtype: torch.dtype | None, dropout: float = 0.0) -> Any:
    """A causal language model, or the one inside a multimodal model.

    Args:
        dtype: None keeps that of the files. On a CPU, parameters are then views of safetensors files, and take no
            memory until they change.

    Raises:
        HpcRlhfError: it cannot be loaded, or its files lack some of its weights.
    """
    model, missing = _load(architectures.causal_class, source, dtype, dropout)
    _refuse_missing(missing, source, "a causal language model with all its weights is needed")
    packed_attention.enable(model)
    return model


def _refuse_missing(names: list[str], source: str, hint: str) -> None:
    if names:
        others = f" and {len(names) - 1} others" if names[1:] else ""
        raise HpcRlhfError(f"the model's files lack the weights {names[0]}{others}", where=source, hint=hint)


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
            f"the model takes {limit} tokens, but a sequence may have {longest}",
            where=source,
            hint="lower data.max_prompt_tokens or data.max_answer_tokens; in pretraining, sequence_length",
        )


def _kept_head(source: str) -> model_files.Head | None:
    """The score head in a model's files, as far as they are here.

    Raises:
        HpcRlhfError: it cannot be kept as it is.
    """
    where = model_files.folder(source)
    try:
        return None if where is None else model_files.score_head(where)
    except model_files.HeadError as error:
        raise HpcRlhfError(str(error), where=source, hint=model_files.HEADS) from error


def has_score_head(source: str) -> bool:
    """Whether a model is a finished reward model.

    Raises:
        HpcRlhfError: its head cannot be kept as it is.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(source, trust_remote_code=False)  # it may have to be downloaded
    except (OSError, ValueError):
        return False  # loading it will say why
    return _kept_head(source) is not None


def load_reward(source: str, dtype: torch.dtype, seed: int | None, dropout: float = 0.0) -> RewardModel:
    """A reward model from a finished one, with its head, or from a language model, with a new head.

    Args:
        seed: initializes a new head; None requires a finished reward model.

    Raises:
        HpcRlhfError: it cannot be loaded, or its head cannot be kept as it is, or there is none and no seed.
    """
    model, missing = _load(architectures.scored_class, source, dtype, dropout, labels=1)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise HpcRlhfError("this architecture has no linear score head in transformers", where=source)
    others = [name for name in missing if name != score_head.WEIGHT]
    _refuse_missing(others, source, "a causal language model or a reward model with all its weights is needed")
    kept = _kept_head(source)
    if score_head.WEIGHT not in missing:
        kept = kept or model_files.Head("score")  # in files that only torch reads
        exact = score_head.stored(model_files.folder(source), f"{kept.name}.weight")
    elif kept is not None:
        raise HpcRlhfError("its score head could not be read", where=source, hint=model_files.HEADS)
    elif seed is None:
        raise HpcRlhfError("it is no reward model: it has no score head", where=source, hint="add the reward stage")
    else:
        with gathered([head.weight], to_change=True), torch.no_grad():
            generator = torch.Generator().manual_seed(seeds.derive(seed, "score head"))
            spread = 1 / math.sqrt(head.weight.shape[1] + 1)
            exact = torch.empty(head.weight.shape).normal_(0, spread, generator=generator)
            head.weight.copy_(exact)
    packed_attention.enable(model)
    reward = RewardModel(model, exact)
    if kept is not None:
        reward.offset -= kept.bias
    return reward


@contextmanager
def sharded_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Within it, models are loaded in ZeRO-3 shards if the config says stage 3; and split if it has tensor parallelism
    and their files allow it."""
    if ds_config["zero_optimization"]["stage"] != 3:
        before = _ways.set(ds_config.get("tensor_parallel", {}).get("autotp_size", 1))
        try:
            yield
        finally:
            _ways.reset(before)
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(copy.deepcopy(ds_config))  # transformers keeps only a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


@contextmanager
def loading(stop: StopControl, ds_config: dict[str, Any], whole: bool = False) -> Iterator[None]:
    """``sharded_loading`` that ends early when the attempt is to stop. Collective; see ``StopControl.check``.

    A load that fails while this rank has to stop counts as cancelled: the files it needs may be going down
    with the node.

    Two kinds of loading are not interrupted; if they are killed, no training is lost. ZeRO-3 loads on all
    ranks together (13B in bf16 take 13 to 26 s at 1 to 2 GB/s) and stops before the next model. A download
    from a hub may take minutes; files that are complete are kept for the next attempt.

    Args:
        whole: load models whole, also where tensor parallelism will split them.
    """
    stop.check()

    def should_stop() -> bool:  # without a heartbeat, which would start the watchdog's clock
        return stop.flag.code > 0

    sharded = ds_config["zero_optimization"]["stage"] == 3
    try:
        with nullcontext() if whole else sharded_loading(ds_config), interruptible(bool if sharded else should_stop):
            yield
    except Exception:
        if not should_stop():
            raise
    stop.check()
