"""Plain turns of Human: and Assistant: as a chat template, for programs that load a model without this package.

In this package, a tokenizer without a template means plain turns (see ``data.rows.transcript``); both give the same
tokens.
"""

from __future__ import annotations

from typing import Any

PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ '\\n\\n' + message['content'] | trim }}"
    "{%- elif message['role'] == 'user' -%}{{ '\\n\\nHuman: ' + message['content'] | trim }}"
    "{%- else -%}{{ '\\n\\nAssistant: ' + message['content'] | trim }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n\\nAssistant:' }}{%- endif -%}"
)


def plain_template(tokenizer: Any) -> str:
    """``PLAIN``, after BOS if the tokenizer starts texts with it, because templates write BOS themselves."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ("{{- bos_token -}}" if bos else "") + PLAIN


def is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer was saved with ``plain_template``."""
    return str(tokenizer.chat_template).endswith(PLAIN)


def drop_plain(tokenizer: Any) -> Any:
    """Remove the template of a tokenizer that was saved with ``plain_template``, in place, and return it."""
    if is_plain(tokenizer):
        tokenizer.chat_template = None
    return tokenizer
