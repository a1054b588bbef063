"""Rollouts that would differ when made again, on disk before anything learns from them.

What an inference engine answers depends on how it batches requests. An attempt that repeats a step, perhaps with other
ranks, gets the responses that the step had.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.run.files import fsync_path, make_folder
from hpc_rlhf.train.checkpoint.store import CheckpointStore
from hpc_rlhf.train.models.kept import KeptWeights
from hpc_rlhf.train.rollout.backend import GenerationRequest, Response, Rollout
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine
from hpc_rlhf.train.runtime.world import World

# The purpose of the rollouts that a step learns from.
ROLLOUT = "rollout"


class CommittedRollouts:
    """A ``RolloutBackend`` that keeps what another generates, in a file for each of its calls.

    One-step-off, a step's rollout is drawn with the weights of one step earlier, and most of it while the stage learns
    in that step: ``keep`` the weights, and then ``start`` the next step's rollout.

    Args:
        checkpoints: the stage's; what none of them would repeat is removed.
        kept: the weights that the next step's rollout is drawn with; None if rollouts are drawn with the newest.
    """

    def __init__(
        self, engine: VllmEngine, folder: Path, checkpoints: CheckpointStore, world: World,
        kept: KeptWeights | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.folder, self.checkpoints, self.world, self.kept = engine, folder, checkpoints, world, kept
        self._step, self._purpose, self._calls = 0, "", 0
        self._model: Any = None
        self._finish: Callable[[], object] = lambda: None  # commits the rollout that was started

    def begin(self, step: int, purpose: str) -> None:
        """Announce what the next calls are for, as ``Blend.begin``. Collective."""
        self._step, self._purpose, self._calls = step, purpose, 0

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

    def keep(self, step: int) -> None:
        """Keep the current weights, which are those after ``step`` steps, for the rollout of the next step."""
        assert self.kept is not None
        self.kept.keep({"step": step})

    def start(self, step: int, request: GenerationRequest, learned: bool) -> None:
        """Begin to generate a step's rollout with the kept weights, unless it is on disk. The next call of ``generate``
        waits until it is. Collective.

        Args:
            request: that of the step's first call.
            learned: whether the model has other weights by now.

        Raises:
            RolloutCancelled, HpcRlhfError: as ``VllmEngine.sync_weights``; or the kept weights are not those of one
                step earlier.
        """
        weights, within = self._weights(step, ROLLOUT)
        file = self._file(step, ROLLOUT, 0)
        if self._known(file, weights, _keys(request)) is None:
            self.engine.sync_weights(self._model, within if learned else nullcontext)
            self.engine.within = within  # should a server fail later, the model has learned
            wait = self.engine.start(request)
            self._finish = lambda: self._commit(file, weights, _keys(request), wait())

    def generate(self, request: GenerationRequest) -> Rollout:
        """The responses on disk if they are those of this request, otherwise new ones, which are then on disk.
        Collective."""
        self._finish()
        self._finish = lambda: None
        file, keys = self._file(self._step, self._purpose, self._calls), _keys(request)
        self._calls += 1
        weights, within = self._weights(self._step, self._purpose)
        known = self._known(file, weights, keys)
        if known is None:
            self.engine.sync_weights(self._model, within)
            return self._commit(file, weights, keys, self.engine.generate(request))
        tokens, log_probs = zip(*(known[key] for key in keys), strict=True) if keys else ((), ())
        return Rollout.of(request.prompts, tokens, self.world.device, log_probs)

    def _weights(self, step: int, purpose: str) -> tuple[int, Callable[[], AbstractContextManager[None]]]:
        """The number of steps that the weights of a call have learned from, and a context in which the model has them.

        Raises:
            HpcRlhfError: the kept weights are others.
        """
        if self.kept is None or purpose != ROLLOUT or step == 0:
            return step, nullcontext
        kept = self.kept.facts and self.kept.facts["step"]
        if kept != step - 1:
            raise HpcRlhfError(
                f"the rollout of step {step} needs the weights after {step - 1} steps, but those after {kept} are kept",
                where=str(self.checkpoints.folder),
                hint="report this",
                exit_code=RUN_FAILED,
            )
        return step - 1, self.kept.in_model

    def _file(self, step: int, purpose: str, call: int) -> Path:
        return self.folder / f"{step:08d}-{purpose}-{call}.safetensors"

    def _known(self, file: Path, weights: int, keys: Sequence[str]) -> dict[str, Response] | None:
        """The responses in a file by their keys; None if any rank lacks one, or other weights drew them. Collective."""
        known: dict[str, Response] = self.world.on_main(lambda: _read(file, weights))
        return None if any(self.world.gather(any(key not in known for key in keys))) else known

    def _commit(self, file: Path, weights: int, keys: Sequence[str], rollout: Rollout) -> Rollout:
        """Write a rollout to disk. Collective."""
        responses = zip(rollout.responses, rollout.response_log_probs or (), strict=True)
        own = dict(zip(keys, responses, strict=True))
        new = {key: response for each in self.world.gather_data(own) for key, response in each.items()}
        self.world.on_main(lambda: self._write(file, weights, new))
        return rollout

    def _write(self, file: Path, weights: int, responses: Mapping[str, Response]) -> None:
        self.checkpoints.check_owner()
        tokens = [token for each, _ in responses.values() for token in each]
        log_probs = [number for _, each in responses.values() for number in each]
        tensors = {
            "tokens": torch.tensor(tokens, dtype=torch.int64),
            "log_probs": torch.tensor(log_probs, dtype=torch.float32),
            "lengths": torch.tensor([len(each) for each, _ in responses.values()], dtype=torch.int64),
        }
        facts = {"keys": json.dumps(list(responses)), "weights": self.engine.version, "weights_step": str(weights)}
        partial = file.with_suffix(".partial")
        save_file(tensors, str(partial), facts)
        fsync_path(partial)
        os.replace(partial, file)
        fsync_path(self.folder)


def _read(file: Path, weights: int) -> dict[str, Response]:
    """The responses in a file by their keys; none if it is not there, or if other weights drew them."""
    if not file.exists():
        return {}
    try:
        with safe_open(str(file), "pt") as opened:
            facts = opened.metadata()
            if facts["weights_step"] != str(weights):
                return {}
            keys = json.loads(facts["keys"])
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
