"""Runs stages on real ranks on this machine, and stops them at given steps."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from tests.train.ranks import Rank, start

DEADLINE = 240.0


def tiny_spec(run_dir: Path, ranks: int = 2, **stages: dict[str, Any]) -> JobSpec:
    """The demo's SFT, reward model and PPO in a few steps, or the named stages with the given fields."""
    base: dict[str, dict[str, Any]] = {
        "sft": {"lr": 1e-3, "max_steps": 6},
        "reward": {"lr": 1e-3, "max_steps": 4},
        "ppo": {"actor_lr": 1e-3, "critic_lr": 1e-3, "max_steps": 3, "warmup": 1},
        "grpo": {
            "lr": 1e-3,
            "max_steps": 3,
            "warmup": 1,
            "group_size": 4,
            "kl_coef": 0.05,
            "rewards": [{"format": ".*e.*"}],
        },
        "dpo": {"lr": 1e-3, "max_steps": 4},
        "kto": {"lr": 1e-3, "max_steps": 4},
    }
    return JobSpec.model_validate(
        {
            "name": "test",
            "run_dir": str(run_dir),
            "seed": 7,
            "slurm": {"gpus_per_node": 0, "ranks_per_node": ranks},
            "data": {
                "sources": [{"demo": 400}], "max_prompt_tokens": 48, "max_answer_tokens": 16, "held_out": 0.1,
            },
            "models": {
                "actor": {
                    "from_scratch": {
                        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
                        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                    }
                }
            },
            "stages": {
                name: {"micro_batch": 4, "global_batch": 16, "precision": "fp32", **fields, **stages.get(name, {})}
                for name, fields in base.items()
                if name in (stages or ("sft", "reward", "ppo"))
            },
        }
    )  # fmt: skip


def make_run(spec: JobSpec) -> RunDir:
    with claim(spec, "a test") as run:
        prepare(spec, run)
    return run


def launch(run: RunDir, stage: str, ranks: int) -> list[Rank]:
    folder = run.stage(stage).logs
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"test_{rank}.out" for rank in range(ranks)]
    return start(["-m", "hpc_rlhf.task", str(run.path), stage], logs)


def metrics(run: RunDir, stage: str) -> list[dict[str, Any]]:
    path = run.stage(stage).metrics
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_stage(run: RunDir, stage: str, ranks: int, stop_after: int | None = None) -> list[int]:
    """Run a stage; with ``stop_after``, send SIGTERM to one rank as soon as that step is in the metrics.

    Returns:
        The exit code of each rank.
    """
    processes = launch(run, stage, ranks)
    deadline = time.time() + DEADLINE
    try:
        while any(process.poll() is None for process in processes):
            if time.time() > deadline:
                raise TimeoutError(f"stage {stage} did not end; see {run.stage(stage).logs}")
            if stop_after is not None and any(line["step"] >= stop_after for line in metrics(run, stage)):
                processes[-1].send_signal(signal.SIGTERM)
                stop_after = None
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [process.returncode for process in processes]


def log_tail(run: RunDir, stage: str) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(run.stage(stage).logs.glob("test_*.out")))


def weights_digest(run: RunDir, stage: str) -> str:
    """SHA-256 over every weight file of a stage's model."""
    digest = hashlib.sha256()
    for path in sorted(run.stage(stage).model.rglob("*.safetensors")):
        digest.update(path.relative_to(run.stage(stage).model).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
