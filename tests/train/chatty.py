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
