"""Tokenizers with chat templates of the kinds that models come with."""

from __future__ import annotations

from typing import Any

from tests.train import tiny

# ChatML, as Qwen's models have it: a base model's EOS ends a document, not a turn.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 3's: BOS first, headers, content trimmed, nothing after the end of a turn.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Older ones: no special tokens for turns, EOS after a response, and no system message.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Like Qwen3's: the last response starts with its thinking, which is empty if thinking is turned off.
THOUGHT = "<think>\n\n</think>\n\n"
THOUGHTS = CHATML.replace(
    "{{ m.content }}", f"{{% if loop.last and m.role == 'assistant' %}}{THOUGHT}{{% endif %}}{{{{ m.content }}}}"
).replace("assistant\n", f"assistant\n{{% if enable_thinking is false %}}{THOUGHT}{{% endif %}}")
# Templates that read the thinking in a response: kept in the last turn, and with a prompt that depends on
# enable_thinking (as Qwen3's, GLM's and Nemotron's), or that always starts to think and never keeps it (R1's).
READS = "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"  # noqa: E501


def _reads(before: str, empty: str, full: str, prompt: str, no_prompt: str, user: str = "") -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + READS
        + f"{{% if loop.last and thought %}}{full}{{% else %}}{empty}{{% endif %}}{{{{ {before}said }}}}"
        + f"{{% else %}}{{{{ m.content }}}}{user}{{% endif %}}<|im_end|>\n{{% endfor %}}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        + f"{{% if enable_thinking is defined and not enable_thinking %}}{no_prompt}{{% else %}}{prompt}{{% endif %}}"
        + "{% endif %}"
    )  # fmt: skip


_FULL = "<think>\n{{ thought }}\n</think>\n\n"
_SLASH = "{% if m.role == 'user' and enable_thinking is defined and not enable_thinking %}/nothink{% endif %}"
THINKING = {
    "empty block": _reads("", THOUGHT, _FULL, "", THOUGHT),
    "slash": _reads("", "<think></think>\n", "<think>{{ thought }}</think>\n", "", "<think></think>", _SLASH),
    "prefilled": _reads("", "<think></think>", _FULL, "<think>\n", "<think></think>"),
    "ignores the setting": CHATML,
    "drops it": _reads("", "", "", "<think>\n", "<think>\n"),
    "closes it": _reads("", "</think>", "</think>", "</think>", "</think>"),
}
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS, "thoughts": THOUGHTS}
MARKS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "headers": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "brackets": ["<s>"],
    "thoughts": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
ENDS = {"chatml": "<|im_end|>", "headers": "<|eot_id|>", "brackets": "</s>", "thoughts": "<|im_end|>"}


def tokenizer(kind: str) -> Any:
    """A tokenizer as it is loaded from the hub, before a run sets it up."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKS[kind]})
    if kind in ("chatml", "thoughts"):
        made.eos_token = made.pad_token = "<|endoftext|>"
        made.bos_token = None
    elif kind == "headers":
        made.bos_token = "<|begin_of_text|>"
    made.chat_template = TEMPLATES[kind]
    return made


def thinking(kind: str) -> Any:
    """A tokenizer with a template that knows thinking, whose marks are tokens but no special ones."""
    made = tokenizer("chatml")
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = THINKING[kind]
    return made
