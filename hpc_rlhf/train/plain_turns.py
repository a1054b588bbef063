"""Plain turns of Human: and Assistant: as a chat template, for those who read an artifact without this package.

Here, a tokenizer without a template means plain turns (see ``data.rows.transcript``); the tokens are the same.
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


def drop_plain(tokenizer: Any) -> Any:
    """Make a tokenizer that was saved with ``plain_template`` one without a template, as it was in training."""
    if str(tokenizer.chat_template).endswith(PLAIN):
        tokenizer.chat_template = None
    return tokenizer
