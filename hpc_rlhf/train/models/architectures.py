"""The classes of transformers that a configuration stands for: a causal language model, and one with a score head."""

from __future__ import annotations

from functools import cache
from typing import Any

from hpc_rlhf.errors import HpcRlhfError

# The weights of a score head, by the names that other programs give it: TRL, LLaMA-Factory, OpenRLHF, Eurus.
OTHER_HEADS = {r"^(v_head\.summary|v_head|value_head|reward_head|rm_head|regression_head|classifier)\.": "score."}
# Their classes in transformers have a head of another form.
_WITHOUT_LINEAR_HEAD = ("ctrl", "modernbert-decoder")
# Llama 4's text model is loaded from the whole model by transformers itself, which looks for it below this name.
_LLAMA4_PREFIX = "language_model"


def text_config(config: Any, has_head: bool) -> Any:
    """The configuration of the language model, within one that may be of images and sound as well.

    Args:
        has_head: False if the model's files hold no output head, so that it is tied to the embeddings.
    """
    text = config.get_text_config(decoder=True)
    if text is not config and hasattr(config, "tie_word_embeddings"):  # there the head belongs to the whole model
        # Mistral 3 leaves it out where its default is wrong, so a head in the files decides.
        text.tie_word_embeddings = config.tie_word_embeddings and (text.tie_word_embeddings or not has_head)
    return text


def causal_class(config: Any, where: str) -> Any:
    """The causal language model for a text configuration.

    Raises:
        HpcRlhfError: transformers has none.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise HpcRlhfError(
            f"transformers has no causal language model of type {config.model_type}",
            where=where,
            hint="give a decoder-only language model",
        ) from None


def scored_class(config: Any, where: str) -> Any:
    """The model for a text configuration, with a linear layer ``score`` instead of the output head.

    Raises:
        HpcRlhfError: transformers has no causal language model for it.
    """
    from transformers import AutoModelForSequenceClassification

    known: Any = AutoModelForSequenceClassification._model_mapping
    config_class: Any = type(config)
    if config_class in known and config.model_type not in _WITHOUT_LINEAR_HEAD:
        return known[config_class]
    return _make_scored_class(config_class, causal_class(config, where))


@cache
def _make_scored_class(config_class: Any, causal: Any) -> Any:
    """A class like those that transformers has for most architectures. ``AutoModelForSequenceClassification`` knows it
    from then on, in this process."""
    from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    parent = next(each for each in causal.__mro__[1:] if issubclass(each, PreTrainedModel))
    scored = type(
        causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification",
        (GenericForSequenceClassification, parent),
        {
            "config_class": config_class,
            "base_model_prefix": AutoModel._model_mapping[config_class].base_model_prefix,
            "__module__": causal.__module__,  # the weights of its own code are renamed as they are loaded
        },
    )
    AutoModelForSequenceClassification.register(config_class, scored, exist_ok=True)
    return scored


def renamed_weights(config: Any, model_class: Any) -> dict[str, str]:
    """How to rename a multimodal model's weights, by pattern, so that its language model loads alone.

    Args:
        config: of the whole model.
        model_class: what is loaded.
    """
    name = model_class.base_model_prefix
    if config.get_text_config(decoder=True) is config or name == _LLAMA4_PREFIX:
        return {}
    return {
        rf"^{_LLAMA4_PREFIX}\.lm_head\.": "lm_head.",
        rf"^({_LLAMA4_PREFIX}\.model|model\.{_LLAMA4_PREFIX})\.": f"{name}.",
    }
