"""Serves a finished model with an OpenAI-compatible API: by vLLM if it is installed, else by our own server.

``python -m hpc_rlhf.train.serve FOLDER --name NAME --host HOST --port PORT --token FILE --ready FILE`` is what a Slurm
job runs.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from hpc_rlhf import safe_path
from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.plain_turns import plain_template

# Seconds that responses have to end when the server is stopped.
GRACE = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hpc_rlhf.train.serve", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="of the model in requests")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--token", required=True, type=Path, help="file with the token that clients must give")
    parser.add_argument("--ready", required=True, type=Path, help="file to create when the server responds")
    args = parser.parse_args()
    try:
        serve(args.folder, args.name, args.host, args.port, args.token.read_text().strip(), args.ready.touch)
    except HpcRlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def serve(folder: Path, name: str, host: str, port: int, token: str, ready: Callable[[], object]) -> None:
    """Serve in this process until a signal ends it.

    Args:
        name: of the model in requests.
        token: what clients must give as their API key.
        ready: called when the server responds; before it loads the model if it is vLLM's.

    Raises:
        HpcRlhfError: the server is not installed, or cannot listen.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    if find_spec("vllm"):
        ready()
        become_vllm(folder, name, host, port, token)
    missing = [module for module in ("fastapi", "uvicorn") if not find_spec(module)]
    if missing:
        raise HpcRlhfError(
            f"serving needs {' and '.join(missing)}",
            hint="pip install 'hpc-rlhf[serve]', or vllm on a machine with GPUs",
        )
    with listen(host, port) as listener:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import uvicorn

        from hpc_rlhf.train.chat import ChatModel
        from hpc_rlhf.train.server.access import Guard
        from hpc_rlhf.train.server.app import make_app

        app = Guard(make_app(ChatModel(folder), name, ready), token, host)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=GRACE
        )
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens before the model is loaded, so that a port in use is reported at once.

    Raises:
        HpcRlhfError: the address cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise HpcRlhfError(
            "something else listens there" if in_use else f"this machine cannot listen there ({error.strerror})",
            where=f"{host}:{port}",
            hint="choose another port with --port" if in_use else "choose another address with --host",
            exit_code=RUN_FAILED,
        ) from error


def become_vllm(folder: Path, name: str, host: str, port: int, token: str) -> None:
    """Replace this process by vLLM's server, so that signals reach it. Our guard stands in front of all its paths."""
    from transformers import AutoTokenizer

    arguments = ["--model", str(folder), "--served-model-name", name, "--host", host, "--port", str(port)]
    arguments += ["--middleware", "hpc_rlhf.train.server.access.VllmGuard"]
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if not tokenizer.chat_template:  # models of earlier versions have none
        arguments += ["--chat-template", plain_template(tokenizer)]
    for variable in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):  # endpoints that change the server
        os.environ.pop(variable, None)
    os.environ.update(VLLM_API_KEY=token, HPC_RLHF_SERVE_HOST=host)
    command = safe_path.module("vllm.entrypoints.openai.api_server", *arguments)
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
