"""The in-process rollout backend: generates responses with the model in training, sharded or not."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from hpc_rlhf.spec.sizes import CACHE_SHARE, WEIGHTS_SHARE
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, RolloutCancelled
from hpc_rlhf.train.rollout.in_process import trial
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.decoding import decode
from hpc_rlhf.train.rollout.in_process.gathered_model import GatheredModel
from hpc_rlhf.train.runtime.world import World

# States that ranks exchange before forward passes they make together; the largest wins.
DONE, MORE, STOP = range(3)


class RolloutEngine:
    """A ``RolloutBackend`` that generates fast with a model in training.

    For a rollout, the weights go into a second model with adapters merged: shared if they are whole, gathered
    once if ZeRO-3 or tensor parallelism shards them. Their memory is freed afterwards. If the model is too
    large for that, some layers are gathered in every forward pass, which all ranks then make together.

    Up to rounding, a response depends only on its prompt and key; the same request gives the same bits.

    Args:
        model: the transformers model inside the training engine.
        memory: bytes to divide between weights and cache; None for the device's, unlimited on a CPU.
    """

    def __init__(self, model: Any, world: World, memory: int | None = None) -> None:
        self.model = model
        self.world = world
        self.memory = _memory(world.device) if memory is None else memory
        self.gathered = GatheredModel(model, int(WEIGHTS_SHARE * self.memory))
        self.step = DecodeStep(self.gathered.module, may_trace=not self.gathered.streamed)

    def sync_weights(self, model: Any) -> None:
        """Nothing to do: every rollout takes the weights from the model in training itself."""
        assert model is self.model

    def generate(self, request: GenerationRequest) -> Rollout:
        """A response to each prompt. Collective under ZeRO-3 and tensor parallelism.

        Ranks with the same samples have the same prompts and share the work.

        Raises:
            RolloutCancelled: ``request.should_stop`` returned True on any rank of the group, or on any rank
                at all if forward passes are made together.
        """
        return Rollout.of(request.prompts, self._responses(request), self.world.device)

    def _responses(self, request: GenerationRequest) -> list[list[int]]:
        world, sharers = self.world, self.world.dims.sharers(self.world.rank)
        if len(sharers) == 1:
            return self._decode(request)
        shares: list[list[int]] = [[] for _ in sharers]
        for row in range(len(request.prompts)):
            shares[row // request.group_size % len(shares)].append(row)
        mine = shares[sharers.index(world.rank)]
        own: list[list[int]] | None = None
        with suppress(RolloutCancelled):
            keys = request.keys and [request.keys[row] for row in mine]
            own = self._decode(replace(request, prompts=[request.prompts[row] for row in mine], keys=keys))
        responses: list[list[int]] = [[] for _ in request.prompts]
        for rows, share in zip(shares, world.gather_sharers(own), strict=True):
            if share is None:
                raise RolloutCancelled
            for row, response in zip(rows, share, strict=True):
                responses[row] = response
        return responses

    def _decode(self, request: GenerationRequest) -> list[list[int]]:
        responses: list[list[int]] = [[] for _ in request.prompts]
        longest = max(map(len, request.prompts), default=0) + request.max_new_tokens
        fitting = int(CACHE_SHARE * self.memory) // (longest * bytes_per_token(self.model))
        request = replace(request, max_batch=max(1, min(request.max_batch, fitting)))

        def agree(state: int) -> int:
            state = STOP if request.should_stop() else state
            state = self.world.max(state) if self.gathered.streamed else state
            if state == STOP:
                raise RolloutCancelled
            return state

        with self.gathered.filled():
            if self.step.ways is None:
                together = self.world.max if self.gathered.streamed else int
                trial.choose(self.step, together, self.world.is_main)
            for tokens in decode(self.step, request, lambda: agree(MORE)):
                for number, token in tokens:
                    responses[number].append(token)
            while self.gathered.streamed and agree(DONE) == MORE:
                self.gathered.join_forward()
        return responses


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else sys.maxsize


def bytes_per_token(model: Any) -> int:
    """Bytes of the keys and values of one token."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # recurrent layers have a state of fixed size instead
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * dim * model.dtype.itemsize
