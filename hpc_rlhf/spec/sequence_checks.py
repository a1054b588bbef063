"""Which models attend within packed sequences, and within those that ranks share, as far as configurations show it.

``check`` asks on a login node, and each stage asks again before it trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hpc_rlhf.spec import model_files
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.model_files import Problem
from hpc_rlhf.spec.stages import kind_of
from hpc_rlhf.spec.training import TrainingSpec

# Config fields of attention variants that scaled_dot_product_attention does not compute.
OWN_ATTENTION = ("attn_logit_softcapping", "logit_soft_cap", "alibi")
# Config fields of models whose logits are more than the head's output.
OWN_LOGITS = (
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale", "logits_scaling",
    "lm_head_multiplier", "logits_mup_width_multiplier",
)  # fmt: skip
# Kinds of layers whose tokens see others through this attention alone; recurrent layers, convolutions and attention
# within chunks of a row are of other kinds.
PACKABLE = frozenset({"full_attention", "sliding_attention", "attention"})
# Config fields that list the kinds of layers, and those of the number of heads.
LAYER_KINDS = ("layer_types", "layers_block_type")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")

HINT = "leave sequence_parallel out; activation_checkpointing: true and a smaller micro_batch also save memory"


def problems(spec: JobSpec, configs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str | None]]:
    """For each problem the field of the spec, what is wrong and what to do.

    Args:
        configs: of the models that are here, by their name in the spec.
    """
    for name in spec.stage_names:
        stage = spec.stage(name)
        if not isinstance(stage, TrainingSpec) or stage.sequence_parallel == 1:
            continue
        for model in kind_of(name).models:
            problem = unshared(configs.get(model, {}), stage.tensor_parallel, stage.sequence_parallel)
            if problem is not None:
                yield f"stages.{name}.sequence_parallel", f"models.{model}: {problem[0]}", problem[1]


def unshared(fields: Mapping[str, Any], tensor: int, sequence: int) -> Problem | None:
    """Why ranks cannot share a model's sequences, and what to do; None if nothing is known against it.

    Args:
        fields: a configuration's.
        tensor, sequence: ranks that share a layer, and a sequence.
    """
    text = model_files.text_fields(fields)
    kind = model_files.model_type(fields)
    heads = next((text[name] for name in _HEADS if isinstance(text.get(name), int)), None)
    if heads is not None and heads % (tensor * sequence):
        ways = f"sequence_parallel: {sequence}" + (f" and tensor_parallel: {tensor}" if tensor > 1 else "")
        return f"its {heads} attention heads cannot be divided by {ways}", "set it to a divisor, or leave it out"
    if others := layer_kinds(text) - PACKABLE:
        return f"{kind} models have layers ({', '.join(sorted(others))}) that do not run on a part of a sequence", HINT
    if own := next((name for name in (*OWN_ATTENTION, *OWN_LOGITS) if text.get(name)), None):
        return f"{kind} models with {own} do not run on a part of a sequence", HINT
    if model_files.rotary_switch(fields) is not None:
        return f"the rotary embedding of {kind} models depends on the length of the whole sequence", HINT
    return None


def layer_kinds(text: Mapping[str, Any]) -> set[str]:
    """The kinds of layers that the fields of a language model's configuration list; empty if they list none."""
    return set(map(str, next(filter(None, map(text.get, LAYER_KINDS)), ())))
