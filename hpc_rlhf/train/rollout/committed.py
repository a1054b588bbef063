"""Rollouts that would differ when made again, on disk before anything learns from them.

What an inference engine answers depends on how it batches requests. An attempt that repeats a step, perhaps with other
ranks, gets the responses that the step had.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpc_rlhf.run.files import fsync_path, make_folder
from hpc_rlhf.train.checkpoint.store import CheckpointStore
from hpc_rlhf.train.rollout.backend import GenerationRequest, Response, Rollout
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine
from hpc_rlhf.train.runtime.world import World


class CommittedRollouts:
    """A ``RolloutBackend`` that keeps what another generates, in a file for each of its calls.

    Args:
        checkpoints: the stage's; what none of them would repeat is removed.
    """

    def __init__(self, engine: VllmEngine, folder: Path, checkpoints: CheckpointStore, world: World) -> None:
        self.engine, self.folder, self.checkpoints, self.world = engine, folder, checkpoints, world
        self._purpose, self._calls = "", 0
        self._model: Any = None

    def begin(self, step: int, purpose: str) -> None:
        """Announce what the next calls are for, as ``Blend.begin``. Collective."""
        self._purpose, self._calls = f"{step:08d}-{purpose}", 0

        def clear() -> None:
            make_folder(self.folder)
            oldest = min(self.checkpoints.steps, default=0)
            for other in self.folder.glob("*.safetensors"):
                if int(other.name.partition("-")[0]) < oldest:
                    other.unlink(missing_ok=True)

        self.world.on_main(clear)

    def sync_weights(self, model: Any) -> None:
        """Only noted: responses that are on disk need no weights."""
        self._model = model

    def generate(self, request: GenerationRequest) -> Rollout:
        """The responses on disk if they are those of this request, otherwise new ones, which are then on disk.
        Collective."""
        file = self.folder / f"{self._purpose}-{self._calls}.safetensors"
        self._calls += 1
        keys = _keys(request)
        known: dict[str, Response] = self.world.on_main(lambda: _read(file))
        if any(self.world.gather(any(key not in known for key in keys))):
            self.engine.sync_weights(self._model)
            rollout = self.engine.generate(request)
            responses = zip(rollout.responses, rollout.response_log_probs or (), strict=True)
            own = dict(zip(keys, responses, strict=True))
            new = {key: response for each in self.world.gather_data(own) for key, response in each.items()}
            self.world.on_main(lambda: self._write(file, new))
            return rollout
        tokens, log_probs = zip(*(known[key] for key in keys), strict=True) if keys else ((), ())
        return Rollout.of(request.prompts, tokens, self.world.device, log_probs)

    def _write(self, file: Path, responses: Mapping[str, Response]) -> None:
        self.checkpoints.check_owner()
        tokens = [token for each, _ in responses.values() for token in each]
        log_probs = [number for _, each in responses.values() for number in each]
        tensors = {
            "tokens": torch.tensor(tokens, dtype=torch.int64),
            "log_probs": torch.tensor(log_probs, dtype=torch.float32),
            "lengths": torch.tensor([len(each) for each, _ in responses.values()], dtype=torch.int64),
        }
        partial = file.with_suffix(".partial")
        save_file(tensors, str(partial), {"keys": json.dumps(list(responses)), "weights": self.engine.version})
        fsync_path(partial)
        os.replace(partial, file)
        fsync_path(self.folder)


def _read(file: Path) -> dict[str, Response]:
    """The responses in a file by their keys; none if it is not there."""
    if not file.exists():
        return {}
    try:
        with safe_open(str(file), "pt") as opened:
            keys = json.loads(opened.metadata()["keys"])
            tokens, log_probs = (opened.get_tensor(name).tolist() for name in ("tokens", "log_probs"))
            ends = list(accumulate(opened.get_tensor("lengths").tolist()))
    except (SafetensorError, LookupError, TypeError, ValueError):
        return {}
    spans = [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]
    return {key: (tokens[span], log_probs[span]) for key, span in zip(keys, spans, strict=True)}


def _keys(request: GenerationRequest) -> list[str]:
    """A name for each response, by what it was asked for with."""
    how = [request.max_new_tokens, request.eos_id, astuple(request.sampling)]
    keys: Sequence[object] = request.keys or [None] * len(request.prompts)
    rows = [[list(prompt), key, *how] for prompt, key in zip(request.prompts, keys, strict=True)]
    return [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:32] for row in rows]
