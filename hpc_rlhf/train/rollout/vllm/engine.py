"""The vLLM rollout backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.spec.rollout import RolloutSpec, interpreter
from hpc_rlhf.train.models.export import GATHERED_AT_ONCE, full_bytes, full_weights, module_weights
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, RolloutCancelled
from hpc_rlhf.train.rollout.vllm.server import Server
from hpc_rlhf.train.runtime import seeds
from hpc_rlhf.train.runtime.world import World

# Seconds between two rounds of the ranks while rank 0 waits for the server.
_ROUND_SECONDS = 0.5
WAITING, ANSWERED, STOP = range(3)


class VllmEngine:
    """A ``RolloutBackend`` that generates with vLLM, on one server that rank 0 starts and speaks for all ranks with.

    The server starts at once, without weights, while models are loaded here. Responses come with the log-probabilities
    by which they were drawn. With the same weights, a response still depends on those it was batched with; see
    ``CommittedRollouts``.

    Args:
        model: the transformers model inside the training engine.
        folder: for the model's configuration.
        longest: tokens of the longest prompt with its response.
        attempt: its name, part of the versions of weights.
        where: the field of the spec with the settings.
        should_stop: polled while the server starts.
    """

    def __init__(
        self, model: Any, world: World, spec: RolloutSpec, folder: Path, longest: int, attempt: str, where: str,
        should_stop: Callable[[], bool] = bool,
    ) -> None:  # fmt: skip
        self.model, self.world, self.where = model, world, where
        self.should_stop = should_stop
        self.weights = module_weights(model)
        self.attempt, self.syncs = attempt, 0
        self._server: Server | None = None
        self._running = False

        def start() -> None:
            config = copy.deepcopy(model.config)
            config.architectures, config.dtype = [type(model).__name__], model.dtype
            config.save_pretrained(str(folder))
            largest = max(full_bytes([p]) for module in self.weights for p in module.parameters)
            arguments = _arguments(model, spec, folder, longest)
            self._server = Server(interpreter(spec), arguments, max(GATHERED_AT_ONCE, largest), where)

        world.on_main(start)

    @property
    def version(self) -> str:
        """Names the weights that the next rollout must be made with; no other attempt or update has this name."""
        return f"{self.attempt}/{self.syncs}"

    def sync_weights(self, model: Any) -> None:
        """Give the server the model's weights, whole, with adapters merged. Collective.

        Raises:
            RolloutCancelled: ``should_stop`` returned True on any rank while the server started.
        """
        assert model is self.model
        if not self._running:
            self._answer(self.should_stop)
            self._running = True
        self.syncs += 1
        self.world.on_main(lambda: self._ask("begin_weights"))
        self._answer(bool)
        failure: HpcRlhfError | None = None
        with closing(full_weights(self.weights)) as weights:
            for name, tensor in weights:
                if self._server is not None and failure is None:
                    try:
                        self._server.pass_weight(name, tensor)
                    except HpcRlhfError as error:  # the other ranks still gather
                        failure = error

        def end() -> None:
            assert self._server is not None
            if failure is not None:
                raise failure
            self._server.flush_weights()
            self._ask("end_weights", version=self.version)

        self.world.on_main(end)
        self._answer(bool)

    def generate(self, request: GenerationRequest) -> Rollout:
        """A response to each prompt. Collective over all ranks.

        Raises:
            RolloutCancelled: ``request.should_stop`` returned True on any rank.
            HpcRlhfError: the server failed, or answered with other weights than those of the last ``sync_weights``.
        """
        own = [[list(prompt), self._seed(request, row)] for row, prompt in enumerate(request.prompts)]
        shares: list[list[Any]] = self.world.gather_data(own)
        asked = [each for share in shares for each in share]
        # The likeliest response to a prompt is needed once, whichever ranks ask for it.
        names = [str(each if request.keys is None else place) for place, each in enumerate(asked)]
        distinct = dict(zip(names, asked, strict=True))
        question = {
            "version": self.version,
            "prompts": [prompt for prompt, _ in distinct.values()],
            "seeds": [seed for _, seed in distinct.values()],
            "sampling": _sampling(request),
        }
        self.world.on_main(lambda: self._ask("generate", **question))
        answer = self._answer(request.should_stop)
        if answer["version"] != self.version:
            raise HpcRlhfError(
                f"vLLM answered with weights {answer['version']}, not with {self.version}", self.where,
                exit_code=RUN_FAILED,
            )  # fmt: skip
        answers = dict(zip(distinct, answer["responses"], strict=True))
        first = sum(map(len, shares[: self.world.data_rank]))
        mine = [answers[name] for name in names[first : first + len(own)]]
        return Rollout.of(
            request.prompts, [tokens for tokens, _ in mine], self.world.device, [log_probs for _, log_probs in mine]
        )  # fmt: skip

    def _ask(self, do: str, **arguments: Any) -> None:
        assert self._server is not None
        self._server.ask(do, **arguments)

    def _answer(self, should_stop: Callable[[], bool]) -> Any:
        """The server's answer, on every rank. Ranks meet while they wait, so that none seems to hang."""
        while True:
            answer, failure = None, None
            if self._server is not None:
                try:
                    answer = self._server.poll(_ROUND_SECONDS)
                except HpcRlhfError as error:
                    failure = error
            state = ANSWERED if answer or failure else WAITING
            state = self.world.max(STOP if should_stop() else state)
            if state == STOP:
                raise RolloutCancelled
            if state == ANSWERED:
                return self.world.on_main(lambda: _taken(answer, failure))  # noqa: B023

    def _seed(self, request: GenerationRequest, row: int) -> int | None:
        if request.keys is None or request.sampling.greedy:
            return None
        return seeds.derive(*request.keys[row]) % 2**63

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


def _taken(answer: tuple[Any] | None, failure: HpcRlhfError | None) -> Any:
    if failure is not None:
        raise failure
    assert answer is not None
    return answer[0]


def _arguments(model: Any, spec: RolloutSpec, folder: Path, longest: int) -> Mapping[str, Any]:
    """Arguments of ``vllm.LLM``."""
    on_gpu = torch.cuda.is_available()
    of_spec: dict[str, Any] = {"enforce_eager": not on_gpu, **spec.args}
    if spec.max_num_seqs is not None:
        of_spec["max_num_seqs"] = spec.max_num_seqs
    if spec.tensor_parallel > 1:
        of_spec["distributed_executor_backend"] = "mp"
    return {
        **of_spec,
        "model": str(folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tensor_parallel_size": spec.tensor_parallel,
        "gpu_memory_utilization": spec.gpu_memory,
        "max_model_len": longest,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        # Those of the distribution that tokens are drawn from, at its temperature.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "trust_remote_code": False,
        "seed": 0,
    }


def _sampling(request: GenerationRequest) -> Mapping[str, Any]:
    """Arguments of ``vllm.SamplingParams``."""
    sampling = request.sampling
    return {
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p,
        "top_k": 0 if sampling.greedy else sampling.top_k,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": [request.eos_id],
    }
