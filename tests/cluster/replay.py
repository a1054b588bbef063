"""A run that learns from the responses of another one, without vLLM."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpc_rlhf.run.layout import StageDir
from tests.spec.test_rollout import python_with
from tests.train.rollout.stand_in_vllm import interpreter


def keep(files: StageDir, into: Path) -> None:
    """Link a stage's rollouts, which it removes as it goes on."""
    for file in files.rollouts.glob("*.safetensors"):
        with suppress(OSError):  # it is already there, or gone, or the disk is full
            os.link(file, into / file.name)


@contextmanager
def keeping(files: StageDir, into: Path) -> Iterator[None]:
    """``keep`` again and again while the block runs."""
    into.mkdir()
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.2):
            keep(files, into)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        keep(files, into)


def replay(files: StageDir, kept: Path, folder: Path) -> str:
    """Give kept rollouts to a stage that has not begun.

    Args:
        folder: a new one.

    Returns:
        a Python for its spec with which vLLM does not start, so that it fails if it asks for another rollout.
    """
    shutil.copytree(kept, files.rollouts)
    python = Path(python_with(folder, "0.32.0"))
    return interpreter(python.parent, "refuses")
