"""Serves a finished model with an OpenAI-compatible API.

``python -m hpc_rlhf.train.serve FOLDER --name NAME --host HOST --port PORT`` uses vLLM's server if it is
installed, else that of transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hpc_rlhf.train.plain_turns import plain_template

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hpc_rlhf.train.serve", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="of the model in requests")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpc-rlhf-serve-") as scratch:
        # Offer no model but this one.
        os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_CACHE=scratch)
        folder = args.folder.resolve()
        os.chdir(scratch)
        link_model(folder, Path(args.name))
        serve(args.name, args.host, args.port)


def link_model(folder: Path, place: Path) -> None:
    """Link the model at ``place``, adding a chat template if its tokenizer has none."""
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


def serve(name: str, host: str, port: str) -> None:
    """Serve the model in the folder of this name until terminated."""
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
