"""llama.cpp's own answers about GGUF files, in a process of its own.

``python -m tests.train.models.llama_cpp_answers`` reads JSON from stdin: a list of files, each with texts to tokenize,
the tokens of a prompt and how many to draw. It prints JSON: for each file the tokens of the texts, the likeliest tokens
after the prompt, the ids of BOS and EOS, and the chat template.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from cyllama.llama import llama_cpp

_F32, _NO_FLASH = 0, 0


def answer(file: str, texts: list[str], prompt: list[int], count: int) -> dict[str, Any]:
    parameters = llama_cpp.LlamaModelParams()
    parameters.n_gpu_layers = 0
    model = llama_cpp.LlamaModel(file, parameters)
    vocabulary = model.get_vocab()
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = settings.n_batch = 256
    settings.n_threads = 1
    settings.type_k = settings.type_v = _F32
    settings.flash_attn_type = _NO_FLASH
    context = llama_cpp.LlamaContext(model, settings)
    sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
    sampler.add_greedy()
    drawn: list[int] = []
    batch, position = llama_cpp.llama_batch_get_one(prompt), len(prompt)
    for _ in range(count):
        context.decode(batch)
        drawn.append(sampler.sample(context, -1))
        batch, position = llama_cpp.llama_batch_get_one(drawn[-1:], position), position + 1
    return {
        "tokens": [vocabulary.tokenize(text, add_special=True, parse_special=True) for text in texts],
        "drawn": drawn,
        "ends": [vocabulary.token_bos(), vocabulary.token_eos()],
        "template": model.get_default_chat_template(),
    }


if __name__ == "__main__":
    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()
    print(json.dumps([answer(*each) for each in json.load(sys.stdin)]))
