"""A batch of responses by vLLM that requests join and leave at any time."""

from __future__ import annotations

import mmap
from itertools import count
from pathlib import Path

from torch import dtype

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.rollout import RolloutSpec, interpreter
from hpc_rlhf.train.rollout.in_process.open_batch import OpenBatch, Request
from hpc_rlhf.train.rollout.vllm.arguments import engine_arguments, sampling_arguments
from hpc_rlhf.train.rollout.vllm.server import Server
from hpc_rlhf.train.runtime import seeds

# Seconds in which a step is sure to end, even of a long prompt on a CPU.
STEP_SECONDS = 300.0


class VllmBatch:
    """Draws responses together in a process of vLLM's, which ends with this one. Its methods are those of
    ``in_process.open_batch.OpenBatch``.

    Args:
        folder: of the finished model.
        precision: of its weights.
        eos_id: the token that ends a response.
        gpu_memory: the share of each GPU's memory that vLLM takes.

    Attributes:
        budget: how many tokens a prompt and its response may have, for which there is a cache.

    Raises:
        HpcRlhfError: vLLM does not start. So do the methods if it has failed.
    """

    def __init__(self, folder: Path, precision: dtype, eos_id: int, rollout: RolloutSpec, gpu_memory: float) -> None:
        self.eos_id = eos_id
        arguments = {
            **engine_arguments(rollout, folder, precision),
            "gpu_memory_utilization": gpu_memory,
            "max_model_len": -1,  # the longest that fits
            "stream_interval": 1,
            "use_tqdm_on_load": False,
        }
        self._server = Server(("start", interpreter(rollout)), arguments, mmap.PAGESIZE, {})
        self._server.wait()
        self._server.silence = STEP_SECONDS
        self._server.ask("context")
        self.budget: int = self._server.wait()
        self._names = map(str, count())
        self._live: dict[Request, str] = {}
        self._begin: list[Request] = []
        self._end: list[str] = []
        self._failure: HpcRlhfError | None = None

    def add(self, request: Request) -> None:
        self._live[request] = next(self._names)
        self._begin.append(request)

    def remove(self, request: Request) -> None:
        """Stop responding to a request, if it is not finished."""
        if request in self._live:
            self._end.append(self._live.pop(request))

    def clear(self) -> None:
        """Drop all requests."""
        for request in list(self._live):
            self.remove(request)

    def is_finished(self, request: Request) -> bool:
        """Whether a response that was begun has ended."""
        return request not in self._live

    def advance(self) -> list[Request]:
        """Make one step, and return the requests to which it added a token; there may be none."""
        if self._failure is not None:
            raise self._failure
        try:
            return self._step()
        except HpcRlhfError as failure:
            self._failure = failure
            raise

    def _step(self) -> list[Request]:
        if self._server.waits:  # the caller was interrupted while it waited for this answer
            self._take(self._server.wait())
        if not self._live:
            return []
        begin, self._begin, end, self._end = self._begin, [], self._end, []
        new = [(self._live[each], each.prompt, self._sampling(each)) for each in begin if each in self._live]
        self._server.ask("advance", begin=new, end=end)
        return self._take(self._server.wait())

    def _sampling(self, request: Request) -> dict[str, object]:
        seed = None if request.sampling.greedy else seeds.derive(*request.key) % 2**63
        return {**sampling_arguments(request.sampling, request.max_tokens, self.eos_id), "seed": seed}

    def _take(self, answer: list[tuple[str, list[int], bool]]) -> list[Request]:
        """Append the tokens of an answer to their requests, and return those."""
        requests, advanced = {name: request for request, name in self._live.items()}, []
        for name, tokens, ended in answer:
            if (request := requests.get(name)) is None:
                continue
            request.tokens += tokens
            if tokens:
                advanced.append(request)
            if ended:
                del self._live[request]
        return advanced


# What draws the responses of ``chat`` and ``serve``.
AnyBatch = OpenBatch | VllmBatch
