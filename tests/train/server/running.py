"""A server in this process, and small models for it.

``python -m tests.train.server.running PORT FOLDER`` is a server that stores votes in FOLDER.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.server.app import make_server
from hpc_rlhf.train.server.voting import Voting
from hpc_rlhf.web.listening import listen
from tests.train import tiny

TOKEN = "a-token"
CONTEXT = 256


def small_model(folder: Path, seed: int = 0) -> Path:
    """Write a model with random weights, and return its folder."""
    model = tiny.causal("llama", seed, vocab_size=300, max_position_embeddings=CONTEXT)
    export(model, tiny.tokenizer(), folder, is_main=True)
    return folder


@contextmanager
def serving(models: Mapping[str, Any], voting: Voting | None = None, twice: bool = False) -> Iterator[str]:
    """Run a server, and give its address. It compares two models, and one with itself if ``twice``."""
    ready, names = threading.Event(), list(models) * (1 + twice)
    compared = names if len(names) == 2 else []
    with listen("127.0.0.1", 0) as listener:
        app = make_server(models, compared, voting, TOKEN, "127.0.0.1", ready.set, lost=print)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


class Scripted:
    """Stands for a chat model: it always writes the same text, a character per token.

    Args:
        pause: seconds before each character.
    """

    context = 4096
    chat_template = "{{ messages }}"  # of a tokenizer, as which it serves, too

    def __init__(self, text: str, pause: float = 0.0) -> None:
        self.text, self.pause = text, pause
        self.tokenizer = self.batch = self
        self.eos_id = 0
        self.live: list[Any] = []
        self.asked: list[Any] = []

    def prompt(self, turns: Any) -> list[int]:
        self.asked.append(turns)
        return [1]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(token) for token in tokens if token != self.eos_id)

    def add(self, request: Any) -> None:
        self.live.append(request)

    def remove(self, request: Any) -> None:
        if request in self.live:
            self.live.remove(request)

    def clear(self) -> None:
        self.live.clear()

    def is_finished(self, request: Any) -> bool:
        return request not in self.live

    def advance(self) -> list[Any]:
        time.sleep(self.pause)
        advanced = list(self.live)
        for request in advanced:
            drawn = len(request.tokens)
            request.tokens.append(ord(self.text[drawn]) if drawn < len(self.text) else self.eos_id)
            if drawn == len(self.text) or drawn + 1 == request.max_tokens:
                self.live.remove(request)
        return advanced


if __name__ == "__main__":
    app = make_server(
        {"sft": Scripted("White.")},
        [],
        Voting(Path(sys.argv[2]), {"sft": "5" * 64}, True),
        TOKEN,
        "127.0.0.1",
        print,
        print,
    )
    uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
