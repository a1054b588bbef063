"""A folder with a job file, hpc-rlhf started there, and fake stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rlhf.run.ledger import Ledger

FAKES = Path(__file__).parent / "fake_stage"
SPEC = """\
name: t
run_dir: run
slurm: {gpus_per_node: 2, heal: {enabled: false, backoff_seconds: 0}}
data: {sources: [{demo: 100}], max_prompt_tokens: 16, max_answer_tokens: 16}
models: {actor: {from_scratch: {model_type: llama, vocab_size: 300}}}
stages:
  sft: {}
  reward: {}
  ppo: {}
"""


@dataclass
class Here:
    """A folder with job.yaml, in which hpc-rlhf is started."""

    folder: Path

    @classmethod
    def new(cls, folder: Path) -> Here:
        (folder / "job.yaml").write_text(SPEC)
        return cls(folder)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Start it in its own process group, like a terminal's foreground job."""
        return subprocess.Popen(
            [sys.executable, "-m", "hpc_rlhf.cli", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(FAKES), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, *words: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*words, **env)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    def events(self, *kinds: str) -> list[tuple[str, str]]:
        events = Ledger(self.run / "ledger.jsonl").events()
        return [(event.name, event.stage) for event in events if event.name in kinds]

    def seen(self, stage: str, rank: int) -> dict[str, Any]:
        """The environment of a rank, and its pid."""
        path = self.run / f"seen-{stage}-{rank}.json"
        wait_for(path.exists)
        wait_for(lambda: path.read_text().endswith("}"))
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def await_ranks(self, stage: str = "sft") -> list[int]:
        return [self.seen(stage, rank)["pid"] for rank in range(2)]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
