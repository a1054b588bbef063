"""A dashboard in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from hpc_rlhf.observe.dashboard.app import make_app
from hpc_rlhf.observe.dashboard.board import Board
from hpc_rlhf.web.listening import listen

TOKEN = "a-token"


@contextmanager
def watching(folder: Path) -> Iterator[str]:
    """Run a dashboard, and give its address."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(Board(folder), TOKEN), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
