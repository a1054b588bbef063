"""Generating answers with a key-value cache from a model in training, sharded or not."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.train.models import packed
from hpc_rlhf.train.models.forward import call, positions
from hpc_rlhf.train.models.weights import full_weights, is_sharded
from hpc_rlhf.train.rollout import decoding
from hpc_rlhf.train.rollout.sampling import Sampling, draw, uniforms
from hpc_rlhf.train.world import World


class RolloutDropped(Exception):
    """Generation was told to stop; what it made is to be made again."""


def decode_steps(
    model: Any, prompt_ids: Tensor, prompt_mask: Tensor, max_tokens: int, sampling: Sampling,
    uniforms: Tensor | None, eos_id: int, pad_id: int, going: Callable[[bool], bool] = bool,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Answers to prompts, a token at a time, each answer ended at its first EOS.

    Args:
        model: a causal language model in eval mode.
        prompt_ids, prompt_mask: (batch, prompt), padded on the left; True on real tokens.
        max_tokens: longest answer.
        uniforms: (batch, max_tokens) of ``sampling.uniforms``; not needed when greedy.
        going: told after each step whether an answer is unfinished; says whether to take another.

    Yields:
        The tokens drawn (batch,), and which of them are real: True up to and including EOS.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    mask = prompt_mask.bool()
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    ids, position = prompt_ids, positions(mask)
    for step in range(max_tokens):
        with torch.no_grad():
            output = call(
                model, ids, mask, position, past_key_values=cache, use_cache=True, **_last_only(model)
            )
            uniform = None if sampling.greedy or uniforms is None else uniforms[:, step].to(prompt_ids.device)
            token = draw(output.logits[:, -1], uniform, sampling.temperature, sampling.top_p, sampling.top_k)
            token = torch.where(alive, token, pad_id)
        yield token, alive
        alive = alive & (token != eos_id)
        if not going(bool(alive.any())):
            return
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        ids, position = token.unsqueeze(1), position[:, -1:] + 1


def decode(*args: Any, stopped: Callable[[], bool] = lambda: False, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The whole of ``decode_steps``: answers (batch, answer) padded on the right, and their mask.

    Args:
        stopped: asked between decode steps.

    Raises:
        RolloutDropped: ``stopped`` said so.
    """
    tokens, masks = [], []
    for token, alive in decode_steps(*args, **kwargs):
        tokens.append(token)
        masks.append(alive)
        if stopped():
            raise RolloutDropped
    mask = torch.stack(masks, dim=1)
    width = int(mask.any(dim=0).sum())  # other ranks' answers may have been longer
    return torch.stack(tokens, dim=1)[:, :width], mask[:, :width]


def _last_only(model: Any) -> dict[str, int]:
    """Only the last position's logits, where the architecture can leave the others out."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _bytes(model: nn.Module) -> int:
    """Memory of a model's weights when none of them is sharded."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())


def _memory(device: torch.device) -> float:
    """A device's memory in bytes; without end where it is the machine's own."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class RolloutEngine:
    """Makes a model in training generate fast.

    A model whole on every rank generates as it is. One sharded by ZeRO-3 is gathered once for a rollout,
    its adapters folded in, into a twin that no hook slows down; afterwards that memory is given back. One too
    large for that generates sharded, all ranks taking every decode step together, which is slow.

    Args:
        model: the transformers model inside the training engine.
        share: the largest share of a GPU's memory that a gathered model may take.

    Attributes:
        together: every decode step is collective.
    """

    def __init__(self, model: Any, world: World, share: float = 0.5) -> None:
        self.model = model
        self.world = world
        self._twin: Any = None
        self.sharded = is_sharded(list(model.parameters()))
        self.together = self.sharded and bool(world.max(_bytes(model) > share * _memory(world.device)))
        if not self.together:
            from accelerate import init_empty_weights

            with init_empty_weights(include_buffers=False):
                self._twin = type(model)(copy.deepcopy(model.config)).eval()
            packed.enable(self._twin)
            self._empty = dict(self._twin.named_parameters())

    def going(self, more: bool) -> bool:
        """Whether to take another decode step, for ``decode_steps``."""
        return bool(self.world.max(more)) if self.together else more

    def stopped(self, code: int) -> bool:
        """Whether a stop flag's code drops the rollout. Collective when the decode steps are."""
        return bool(self.world.max(code) if self.together else code)

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        """The model to generate with. Collective under ZeRO-3: every rank enters."""
        was_training = self.model.training
        self.model.eval()
        try:
            if self._twin is None:
                yield self.model
                return
            for name, tensor in full_weights(self.model):
                # A whole weight is shared, one gathered lasts only until the next.
                held = tensor.clone() if self.sharded else tensor
                self._twin.load_state_dict({name: held}, strict=False, assign=True)
            self._twin.tie_weights()
            buffers = dict(self.model.named_buffers())
            for name, buffer in self._twin.named_buffers():
                buffer.data = buffers[name].data if name in buffers else buffer.data
            yield self._twin
        finally:
            if self._twin is not None:
                self._twin.load_state_dict(self._empty, strict=False, assign=True)
                self._twin.tie_weights()  # else a tied head would keep its memory
            self.model.train(was_training)

    def generate(
        self, prompts: list[list[int]], keys: list[tuple[object, ...]] | None, max_tokens: int,
        sampling: Sampling, eos_id: int, pad_id: int, rows: int, stopped: Callable[[], int] = int,
    ) -> list[list[int]]:  # fmt: skip
        """Answers to prompts, EOS included where one was drawn.

        The same whatever the batch: a prompt's answer depends on its key. Collective under ZeRO-3.

        Args:
            prompts: token ids, none empty.
            keys: what seeds the sampling of each prompt; None when greedy.
            max_tokens: longest answer.
            rows: prompts that are answered at the same time, at most.
            stopped: asked between decode steps whether to drop the rollout.

        Raises:
            RolloutDropped: ``stopped`` said so, on any rank if the decode steps are collective.
        """
        drawn = None if sampling.greedy or keys is None else uniforms(keys, max_tokens)
        answers: list[list[int]] = [[] for _ in prompts]

        def agree(work: int) -> int:
            code = 2 if stopped() else work
            code = self.world.max(code) if self.together else code
            if code == 2:
                raise RolloutDropped
            return code

        with self.ready() as model:
            steps = decoding.decode(
                model, prompts, drawn, max_tokens, sampling, eos_id, rows, lambda: bool(agree(1))
            )
            for said in steps:
                for number, token in said:
                    answers[number].append(token)
            while self.together and agree(0):  # others are not done yet, and need this rank's weights
                with torch.no_grad():
                    model(input_ids=torch.tensor([[pad_id]], device=self.world.device))
        return answers
