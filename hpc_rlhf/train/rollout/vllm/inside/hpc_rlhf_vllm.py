"""What runs in vLLM's own Python: an engine that answers a rank, or a server of a finished model, and the part of it
that takes new weights.

It imports vLLM and the standard library only, because nothing of ours is installed there. Its one connection is a
socket that it inherits; see ``hpc_rlhf/train/rollout/vllm/server.py`` for the messages.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

# Seconds between two signs of life during a rollout.
PROGRESS_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class Weights:
    """What ``worker_extension_cls`` adds to each of vLLM's workers. ``model_runner.reload_weights`` would need all
    weights in one call; these are its three steps."""

    model_runner: Any
    vllm_config: Any

    def begin_weights(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        model = self.model_runner.get_model()
        self.missing = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def load_weights(self, path: str, tensors: list[tuple[str, str, list[int], int]]) -> None:
        """Take some weights from shared memory: the name, type, shape and place of each."""
        import torch
        from vllm.config import set_current_vllm_config

        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)

        def read() -> Iterator[tuple[str, Any]]:
            for name, kind, shape, place in tensors:
                flat = torch.frombuffer(memory, dtype=getattr(torch, kind), count=math.prod(shape), offset=place)
                # vLLM keeps a weight until it has those of the whole layer; the memory is then in use again.
                yield name, flat.view(shape).clone()

        with set_current_vllm_config(self.vllm_config):
            self.missing -= self.model_runner.get_model().load_weights(read())

    def end_weights(self) -> list[str]:
        """The names of the weights that did not come."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_runner.model_config)
            _process_tied(model)
        return sorted(self.missing)


def _process_tied(model: Any) -> None:
    """On CPUs a layer multiplies with a packed copy of its weights. vLLM makes that of layers that it loads, but not of
    an output layer that shares the weights of the embedding."""
    first: dict[int, Any] = {}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            if first.setdefault(id(parameter), layer) is not layer:
                layer.quant_method.process_weights_after_loading(layer)


class Engine:
    """vLLM's engine with versioned weights.

    Args:
        memory: the file descriptor of the memory that new weights come in.
        arguments: of ``vllm.LLM``.
    """

    def __init__(self, connection: Connection, memory: int, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.connection = connection
        self.memory = f"/proc/{os.getpid()}/fd/{memory}"  # for vLLM's workers too
        self.llm = LLM(**arguments, worker_extension_cls="hpc_rlhf_vllm.Weights")
        self.version: str | None = None

    def begin_weights(self) -> None:
        self.version = None
        self.llm.collective_rpc("begin_weights")

    def load_weights(self, tensors: list[Any], used: int) -> None:
        self.llm.collective_rpc("load_weights", args=(self.memory, tensors))

    def end_weights(self, version: str) -> None:
        missing = self.llm.collective_rpc("end_weights")[0]
        if missing:
            raise ValueError(f"no weights came for {', '.join(missing[:5])}; vLLM and the model name them differently")
        self.llm.reset_prefix_cache()
        self.version = version

    def generate(
        self, version: str, prompts: list[list[int]], seeds: list[int | None], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        """A response to each prompt, with the log-probabilities of its tokens."""
        from vllm import SamplingParams

        if version != self.version:
            raise ValueError(f"the weights are of version {self.version}, but {version} is asked for: they are stale")
        engine = self.llm.llm_engine
        rows = {}
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(**sampling, seed=seed, logprobs=0, ignore_eos=True, detokenize=False)
            engine.add_request(str(row), {"prompt_token_ids": prompt}, params)
            rows[str(row)] = row
        responses: list[Any] = [None] * len(prompts)
        spoken = time.monotonic()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    (answer,) = output.outputs
                    tokens = list(answer.token_ids)
                    logprobs = [each[token].logprob for token, each in zip(tokens, answer.logprobs, strict=True)]
                    responses[rows[output.request_id]] = [tokens, logprobs]
            # A rank that does something else meanwhile does not read, and writing to it must not wait.
            if time.monotonic() - spoken > PROGRESS_SECONDS and select.select([], [self.connection.socket], [], 0)[1]:
                spoken = time.monotonic()
                self.connection.send({"progress": sum(each is not None for each in responses)})
        return {"version": self.version, "responses": responses}

    def context(self) -> int:
        """Tokens of the longest prompt with its response for which there is a cache."""
        context: int = self.llm.llm_engine.vllm_config.model_config.max_model_len
        return context

    def advance(
        self, begin: list[tuple[str, list[int], dict[str, Any]]], end: list[str]
    ) -> list[tuple[str, list[int], bool]]:
        """Make one step of all responses.

        Args:
            begin: the name, prompt and sampling of new responses.
            end: the names of responses that are no longer wanted.

        Returns:
            the name of each response that advanced, its new tokens, and whether it has ended.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        engine.abort_request(end)
        for name, prompt, sampling in begin:
            params = SamplingParams(**sampling, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        outputs = engine.step()
        return [(each.request_id, list(each.outputs[0].token_ids), each.finished) for each in outputs]


class Connection:
    """Messages over a socket: 8 bytes with the length, and then JSON. Both sides use it."""

    def __init__(self, own: socket.socket) -> None:
        self.socket = own

    def send(self, message: Any) -> None:
        text = json.dumps(message).encode()
        self.socket.sendall(len(text).to_bytes(8, "little") + text)

    def receive(self) -> Any:
        """The next message; None after the last."""
        head = self._read(8)
        return None if head is None else json.loads(self._read(int.from_bytes(head, "little")) or b"null")

    def _read(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            part = self.socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)


def main(connection: Connection, memory: int) -> None:
    """Make the engine that the first message describes, then do what each message says, and answer it."""
    first = connection.receive()
    if first is None:
        return
    engine = Engine(connection, memory, first)
    from vllm import __version__

    connection.send({"done": __version__})
    while (message := connection.receive()) is not None:
        connection.send({"done": getattr(engine, message.pop("do"))(**message)})


def _end_with_the_engine() -> None:
    """Let one of vLLM's workers end when its engine does, even if that was killed together with the process that keeps
    both. Otherwise it may wait for another worker in an operation that never ends."""
    engine = multiprocessing.parent_process()
    if engine is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != engine.pid:  # it has ended already
            os._exit(1)


if __name__ == "hpc_rlhf_vllm":  # imported for ``Weights``
    _end_with_the_engine()
if __name__ == "__main__":
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    connection.socket.set_inheritable(False)
    try:
        main(connection, int(sys.argv[2]))
    except Exception as error:
        text = " ".join(str(error).split())[:1000]
        connection.send({"error": f"{type(error).__name__}: {text}"})
        raise
