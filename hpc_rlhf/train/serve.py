"""``python -m hpc_rlhf.train.serve FOLDER --name NAME --host HOST --port PORT``: answer OpenAI's protocol with a finished model.

The server is vLLM's where that is installed, else that of transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Plain turns as a chat template, for tokenizers without one: servers know dialogues by templates only. See rows.transcript.
PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ '\\n\\n' + message['content'] | trim }}"
    "{%- elif message['role'] == 'user' -%}{{ '\\n\\nHuman: ' + message['content'] | trim }}"
    "{%- else -%}{{ '\\n\\nAssistant: ' + message['content'] | trim }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n\\nAssistant:' }}{%- endif -%}"
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hpc_rlhf.train.serve", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="of the model in requests")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpc-rlhf-serve-") as made:
        # No other model is offered than this one.
        os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_CACHE=made)
        folder = args.folder.resolve()
        os.chdir(made)
        put_in_place(folder, Path(args.name))
        serve(args.name, args.host, args.port)


def put_in_place(folder: Path, place: Path) -> None:
    """Make the model found at ``place``, with a chat template where its tokenizer has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.chat_template:
        place.symlink_to(folder)
        return
    tokenizer.chat_template = plain_template(tokenizer)
    tokenizer.save_pretrained(str(place))
    for pattern in WEIGHTS:
        for path in folder.glob(pattern):
            (place / path.name).symlink_to(path)


def plain_template(tokenizer: Any) -> str:
    """``PLAIN``, with BOS before it where the tokenizer puts that before a text: templates write it themselves."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ("{{- bos_token -}}" if bos else "") + PLAIN


def serve(name: str, host: str, port: str) -> None:
    """Serve the model in the folder of this name, until told to stop."""
    where = ["--host", host, "--port", port]
    if find_spec("vllm"):
        from runpy import run_module

        sys.argv = ["vllm", "--model", name, *where]
        run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
    else:
        from transformers.cli.transformers import main as transformers

        sys.argv = ["transformers", "serve", name, *where]
        transformers()


if __name__ == "__main__":
    main()
