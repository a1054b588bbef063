"""Generating answers from a model in training, sharded or not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from hpc_rlhf.spec.sizes import CACHE_SHARE, WEIGHTS_SHARE
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.decoding import decode
from hpc_rlhf.train.rollout.in_process.gathered_model import GatheredModel
from hpc_rlhf.train.rollout.in_process.sampling import Sampling, uniforms
from hpc_rlhf.train.runtime.stop_signals import Interrupted
from hpc_rlhf.train.runtime.world import World

# What ranks tell each other where they make forward passes together; the largest counts.
DONE, MORE, STOP = range(3)


class RolloutDropped(Interrupted):
    """Generation was told to stop; what it made is to be made again."""


class RolloutEngine:
    """Makes a model in training generate fast.

    For a rollout, the model's weights are put into a twin, its adapters folded in: shared where they are whole,
    gathered once where ZeRO-3 shards them or they are cut. Afterwards that memory is given back. Of a model too large for that, some
    layers are gathered in every forward pass, which all ranks then make together.

    Args:
        model: the transformers model inside the training engine.
        memory: bytes that a rollout shares out; None for those of the device, without end on a CPU.
    """

    def __init__(self, model: Any, world: World, memory: int | None = None) -> None:
        self.model = model
        self.world = world
        self.memory = _memory(world.device) if memory is None else memory
        self.gathered = GatheredModel(model, int(WEIGHTS_SHARE * self.memory))
        self.step = DecodeStep(self.gathered.module, may_trace=not self.gathered.streamed)

    def generate(
        self, prompts: list[list[int]], keys: list[tuple[object, ...]] | None, max_tokens: int,
        sampling: Sampling, eos_id: int, rows: int, stopped: Callable[[], bool] = bool,
    ) -> list[list[int]]:  # fmt: skip
        """Answers to prompts, EOS included where one was drawn. Collective under ZeRO-3 and tensor parallelism.

        The ranks of a group have the same prompts, and share the work.

        Up to rounding, an answer depends on its prompt and key alone; the same prompts in the same order get the
        same answers bit for bit.

        Args:
            prompts: token ids, none empty.
            keys: what seeds the sampling of each prompt; None when greedy.
            max_tokens: longest answer.
            rows: prompts that are answered at the same time, at most; fewer where memory is short.
            stopped: asked before each forward pass whether to drop the rollout.

        Raises:
            RolloutDropped: ``stopped`` said so, on any rank of the group, or where the forward passes are made
                together on any rank.
        """
        world = self.world
        if world.dims.tensor == 1:
            return self._decoded(prompts, keys, max_tokens, sampling, eos_id, rows, stopped)
        mine = slice(world.dims.coordinate("tensor", world.rank), None, world.dims.tensor)
        made: list[list[int]] | None = None
        with suppress(RolloutDropped):
            made = self._decoded(
                prompts[mine], keys and keys[mine], max_tokens, sampling, eos_id, rows, stopped
            )
        answers: list[list[int]] = [[] for _ in prompts]
        for place, share in enumerate(world.gather_tensor_group(made)):
            if share is None:
                raise RolloutDropped
            answers[place :: world.dims.tensor] = share
        return answers

    def _decoded(
        self, prompts: list[list[int]], keys: list[tuple[object, ...]] | None, max_tokens: int,
        sampling: Sampling, eos_id: int, rows: int, stopped: Callable[[], bool],
    ) -> list[list[int]]:  # fmt: skip
        drawn = None if sampling.greedy or keys is None else uniforms(keys, max_tokens)
        answers: list[list[int]] = [[] for _ in prompts]
        longest = max(map(len, prompts), default=0) + max_tokens
        rows = max(1, min(rows, int(CACHE_SHARE * self.memory) // (longest * _cached_bytes(self.model))))

        def agreed(state: int) -> int:
            state = STOP if stopped() else state
            state = self.world.max(state) if self.gathered.streamed else state
            if state == STOP:
                raise RolloutDropped
            return state

        with self.gathered.filled():
            for said in decode(
                self.step, prompts, drawn, max_tokens, sampling, eos_id, rows, lambda: agreed(MORE)
            ):
                for number, token in said:
                    answers[number].append(token)
            while self.gathered.streamed and agreed(DONE) == MORE:
                self.gathered.join_forward()
        return answers


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else sys.maxsize


def _cached_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * shared * dim * model.dtype.itemsize
