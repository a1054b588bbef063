"""Generating answers with a key-value cache from a model in training, sharded or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_rlhf.train.models.load import call, positions
from hpc_rlhf.train.models.weights import full_weights, is_sharded
from hpc_rlhf.train.rollout.sampling import draw


class RolloutDropped(Exception):
    """Generation was told to stop; what it made is to be made again."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        greedy: take the likeliest token, whatever the rest says.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


def decode_steps(
    model: Any, prompt_ids: Tensor, prompt_mask: Tensor, max_tokens: int, sampling: Sampling,
    uniforms: Tensor | None, eos_id: int, pad_id: int,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Answers to prompts, a token at a time, each answer ended at its first EOS.

    Args:
        model: a causal language model in eval mode, whole on this rank.
        prompt_ids, prompt_mask: (batch, prompt), padded on the left; True on real tokens.
        max_tokens: longest answer.
        uniforms: (batch, max_tokens) of ``sampling.uniforms``; not needed when greedy.

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
        if not alive.any():
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
    return torch.stack(tokens, dim=1), torch.stack(masks, dim=1)


def _last_only(model: Any) -> dict[str, int]:
    """Only the last position's logits, where the architecture can leave the others out."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class RolloutEngine:
    """Makes a model in training generate fast.

    A model whole on every rank generates as it is. One sharded by ZeRO-3 is gathered once for a rollout,
    its adapters folded in, into a twin that no hook slows down; afterwards that memory is given back.

    Args:
        model: the transformers model inside the training engine.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._twin: Any = None
        if is_sharded(list(model.parameters())):
            from accelerate import init_empty_weights

            with init_empty_weights(include_buffers=False):
                self._twin = type(model)(model.config).eval()
            self._empty = dict(self._twin.named_parameters())

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
                self._twin.load_state_dict({name: tensor.clone()}, strict=False, assign=True)
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
