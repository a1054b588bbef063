"""The vLLM rollout backend."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import INPUT_WRONG, RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.rollout import RolloutSpec, interpreter
from hpc_rlhf.train.models.export import GATHERED_AT_ONCE, full_bytes, full_weights, module_weights
from hpc_rlhf.train.rollout.backend import GenerationRequest, Response, Rollout, RolloutCancelled
from hpc_rlhf.train.rollout.vllm.arguments import engine_arguments, sampling_arguments
from hpc_rlhf.train.rollout.vllm.placement import places
from hpc_rlhf.train.rollout.vllm.server import Server
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.world import World

# Seconds between two rounds of the ranks while they wait for servers.
_ROUND_SECONDS = 0.5
IDLE, WAITING, STOP = range(3)
# How often servers are started again in an attempt.
RESTARTS = 3


class VllmEngine:
    """A ``RolloutBackend`` that generates with vLLM, in servers of ``tensor_parallel`` GPUs each, which some of the
    ranks start and drive; see ``placement``.

    Servers start at once, without weights, while models are loaded here. Responses come with the log-probabilities by
    which they were drawn. With the same weights, a response still depends on those it was batched with; see
    ``CommittedRollouts``.

    A server that dies, is silent or gives a wrong answer is started again, up to ``RESTARTS`` times, and asked again.

    Args:
        model: the transformers model inside the training engine, or another with the same configuration.
        folder: for the model's configuration.
        longest: tokens of the longest prompt with its response.
        attempt: its name, part of the versions of weights.
        where: the field of the spec with the settings.
        slurm: the nodes and ranks of the stage.
        should_stop: polled while servers start.

    Attributes:
        within: a context in which ``model`` has the weights of this version.
    """

    def __init__(
        self, model: Any, world: World, spec: RolloutSpec, folder: Path, longest: int, attempt: str, where: str,
        slurm: SlurmSpec, should_stop: Callable[[], bool] = bool,
    ) -> None:  # fmt: skip
        self.model, self.world, self.where = model, world, where
        self.should_stop = should_stop
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.attempt, self.syncs, self.restarts = attempt, 0, 0

        def write_config() -> None:
            config = copy.deepcopy(model.config)
            config.architectures, config.dtype = [type(model).__name__], model.dtype
            config.save_pretrained(str(folder))

        world.on_main(write_config)
        servers = {place.rank: place.gpus for place in places(spec, world, slurm, where)}
        own = servers.get(world.rank)
        self.count, self.number = len(servers), sum(rank < world.rank for rank in servers)
        python, size = interpreter(spec), str(spec.tensor_parallel)
        bridge = ("bridge", str(folder), str(self.number), python, size)
        largest = max(full_bytes(module.parameters) for module in module_weights(model))
        self._at_once = min(GATHERED_AT_ONCE, largest)
        self._start = partial(
            Server, bridge if spec.own_nodes else ("start", python), _arguments(model, spec, folder, longest),
            largest, {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {},
        )  # fmt: skip
        self._server = None if own is None else self._start()
        self._failure: HpcRlhfError | None = None
        self._has = ""  # the version of this server's weights
        self.within: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def version(self) -> str:
        """Names the weights that the next rollout must be made with; no other attempt or update has this name."""
        return f"{self.attempt}/{self.syncs}"

    def sync_weights(self, model: Any, within: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Give every server the weights that the model has within a context, whole, with adapters merged. Collective.

        Raises:
            RolloutCancelled: ``should_stop`` returned True on any rank while a server started.
            HpcRlhfError: servers failed too often.
        """
        self.model, self.within = model, within
        self.syncs += 1
        self._update()

    def release(self) -> None:
        """Keep no reference to the model: it is not asked again."""
        self.model = None

    def generate(self, request: GenerationRequest) -> Rollout:
        """A response to each prompt. Collective over all ranks.

        Raises:
            RolloutCancelled: ``request.should_stop`` returned True on any rank.
            HpcRlhfError: servers failed too often.
        """
        return self.start(request)()

    def start(self, request: GenerationRequest) -> Callable[[], Rollout]:
        """Ask for responses, and return what waits for them and raises as ``generate`` does. Both are collective, and
        nothing else may be asked for in between."""
        own = [[list(prompt), self._seed(request, row)] for row, prompt in enumerate(request.prompts)]
        shares: list[list[Any]] = self.world.gather_data(own)
        asked = [each for share in shares for each in share]
        # The likeliest response to a prompt is needed once, whichever ranks ask for it.
        names = [str(each if request.keys is None else place) for place, each in enumerate(asked)]
        distinct = dict(zip(names, asked, strict=True))
        part = list(distinct.values())[
            len(distinct) * self.number // self.count : len(distinct) * (self.number + 1) // self.count
        ]
        part = part if self._server else []
        self._ask(part, request)

        def finish() -> Rollout:
            answers = dict(zip(distinct, self._answers(part, request), strict=True))
            first = sum(map(len, shares[: self.world.data_rank]))
            mine = [answers[name] for name in names[first : first + len(own)]]
            return Rollout.of(
                request.prompts, [tokens for tokens, _ in mine], self.world.device, [log_probs for _, log_probs in mine]
            )  # fmt: skip

        return finish

    def _ask(self, part: Sequence[Any], request: GenerationRequest) -> None:
        """Ask this rank's server for responses to prompts with their seeds, if there are any."""
        if part:
            question = {"prompts": [prompt for prompt, _ in part], "seeds": [seed for _, seed in part]}
            sampling = sampling_arguments(request.sampling, request.max_new_tokens, request.eos_id)
            self._on_server(Server.ask, "generate", version=self.version, **question, sampling=sampling)

    def _answers(self, part: Sequence[Any], request: GenerationRequest) -> list[Response]:
        """The responses of all servers, each of which was asked for its part. Collective."""
        responses: list[Response] = []
        while True:
            answer = self._settle(request.should_stop)
            if answer is not None:
                responses = self._on_server(self._checked, answer, len(part), request) or []
            if not self._recover():
                return [each for own in self.world.gather(responses) for each in own]
            self._update()
            self._ask([] if responses else part, request)

    def _checked(self, server: Server, answer: Any, count: int, request: GenerationRequest) -> list[Response]:
        """A server's responses.

        Raises:
            HpcRlhfError: it answered something else.
        """
        try:
            version, responses = answer["version"], answer["responses"]
            if version != self.version:
                raise server.failure(f"it answered with weights {version}, not with {self.version}")
            sound = len(responses) == count and all(
                0 < len(tokens) == len(log_probs) <= request.max_new_tokens
                and all(type(token) is int and 0 <= token < self.vocabulary for token in tokens)
                and all(math.isfinite(number) for number in log_probs)
                for tokens, log_probs in responses
            )
        except (LookupError, TypeError, ValueError):
            sound = False
        if not sound:
            raise server.failure("its answer is not a response to each prompt with the log-probabilities of its tokens")
        return list(responses)

    def _update(self) -> None:
        """Give the weights to servers that have others. Collective."""
        while any(self.world.gather(self._is_stale)):
            self._settle(self.should_stop)  # some may still start
            if self._recover():
                continue
            stale = self._is_stale
            if stale:
                self._on_server(Server.ask, "begin_weights")
            self._settle(bool)
            with self.within(), closing(full_weights(module_weights(self.model), self._at_once)) as weights:
                for name, tensor in weights:
                    if stale:
                        self._on_server(Server.pass_weight, name, tensor)
                    del tensor  # the next are gathered in its place
            if stale:
                self._on_server(Server.end_weights, self.version)
            self._settle(bool)
            if self._server is not None and self._failure is None:
                self._has = self.version
            self._recover()

    @property
    def _is_stale(self) -> bool:
        return self._server is not None and self._has != self.version

    def _on_server(self, act: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """Act on this rank's server, the first argument of ``act``, if there is one that has not failed. A failure is
        left to ``_recover``, because other ranks go on."""
        if self._server is None or self._failure is not None:
            return None
        try:
            return act(self._server, *arguments, **more)
        except HpcRlhfError as error:
            self._failure = error
            return None

    def _settle(self, should_stop: Callable[[], bool]) -> Any:
        """Wait until every server has answered what it was asked, or failed. Ranks meet while they wait, so that none
        seems to hang. Collective.

        Returns:
            the answer of this rank's server; None if there is none.
        """
        answer = None
        while True:
            if self._waits:
                got = self._on_server(Server.poll, _ROUND_SECONDS)
                answer = got[0] if got else answer
            state = self.world.max(STOP if should_stop() else WAITING if self._waits else IDLE)
            if state == STOP:
                raise RolloutCancelled
            if state == IDLE:
                return answer

    @property
    def _waits(self) -> bool:
        return self._server is not None and self._failure is None and self._server.waits

    def _recover(self) -> bool:
        """Start servers again that failed. Collective.

        Returns:
            whether there were any.

        Raises:
            HpcRlhfError: a server cannot start, or servers failed too often.
        """
        own: Any = self._failure and (self._failure.message, self._failure.hint, self._failure.exit_code)
        failures = [each for each in self.world.gather(own) if each]
        if not failures:
            return False
        message, hint, code = failures[0]
        if self.restarts == RESTARTS or (code == INPUT_WRONG and not self.restarts):
            often = f" (after {RESTARTS} restarts)" if self.restarts else ""
            code = RUN_FAILED if self.restarts else code
            raise HpcRlhfError(message + often, where=self.where, hint=hint, exit_code=code)
        self.restarts += 1
        if self.world.is_main:
            print(f"hpc-rlhf: warning: {message}; it starts again", file=sys.stderr, flush=True)
        if self._server is not None and self._failure is not None:
            self._server.close()
            self._server, self._failure, self._has = self._start(), None, ""
        return True

    def _seed(self, request: GenerationRequest, row: int) -> int | None:
        if request.keys is None or request.sampling.greedy:
            return None
        return seeds.derive(*request.keys[row]) % 2**63

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


def _arguments(model: Any, spec: RolloutSpec, folder: Path, longest: int) -> Mapping[str, Any]:
    """Arguments of ``vllm.LLM``."""
    return {
        **engine_arguments(spec, folder, model.dtype),
        "gpu_memory_utilization": spec.memory_share,
        "max_model_len": longest,
        "load_format": "dummy",
        # Those of the distribution that tokens are drawn from, at its temperature.
        "logprobs_mode": "processed_logprobs",
    }
