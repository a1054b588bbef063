"""Chat with a finished model on one machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.checkpoint.snapshot import free_memory
from hpc_rlhf.train.data.dialogues import token_ids
from hpc_rlhf.train.data.templates import prompt_text
from hpc_rlhf.train.models import packed_attention, rotary
from hpc_rlhf.train.models.export import context_length
from hpc_rlhf.train.plain_turns import drop_plain
from hpc_rlhf.train.rollout.backend import Sampling
from hpc_rlhf.train.rollout.in_process import trial
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.engine import bytes_per_token
from hpc_rlhf.train.rollout.in_process.open_batch import OpenBatch, Request
from hpc_rlhf.train.rollout.vllm.open_batch import AnyBatch, VllmBatch
from hpc_rlhf.train.text_stream import TextStream

# The share of free memory that keys and values may take, and that of all memory that vLLM takes.
CACHE_SHARE, VLLM_SHARE = 0.8, 0.9
# Temperatures below this take the likeliest token: logits divided by them could overflow, and vLLM would raise them.
GREEDY_BELOW = 1e-2


def sampling_at(temperature: float, top_p: float = 1.0) -> Sampling:
    """How tokens are drawn at a temperature that a user chose; 0 takes the likeliest."""
    return Sampling(greedy=True) if temperature < GREEDY_BELOW else Sampling(temperature, top_p)


def load_models(folders: Mapping[str, Path], vllm: RolloutSpec | None) -> dict[str, ChatModel]:
    """Models that share the memory of this machine, by name.

    Raises:
        HpcRlhfError: vLLM does not start.
    """
    models = {name: ChatModel(folder, vllm, 1 / len(folders)) for name, folder in folders.items()}
    for model in models.values():
        model.limit_cache(1 / len(folders))
    return models


class ChatModel:
    """A model loaded for chat from a Hugging Face folder, on a GPU if there is one.

    Args:
        vllm: how vLLM generates the responses; None if this process does.
        share: of the memory that vLLM may take, if other models need some.

    Attributes:
        batch: all responses that are being drawn.
        context: tokens of the longest conversation with its response.

    Raises:
        HpcRlhfError: vLLM does not start.
    """

    def __init__(self, folder: Path, vllm: RolloutSpec | None = None, share: float = 1.0) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.tokenizer = drop_plain(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        eos_id, self._longest = self.tokenizer.eos_token_id, context_length(config) or sys.maxsize
        self.batch: AnyBatch
        if vllm is not None:
            self.batch = VllmBatch(folder, config.dtype or torch.float32, eos_id, vllm, VLLM_SHARE * share)
        else:
            self.batch = _load(folder, eos_id)
        self.context = min(self._longest, self.batch.budget)

    def limit_cache(self, share: float) -> None:
        """Let a model in this process cache no more than a share of what is free now: other models are loaded, too."""
        if isinstance(self.batch, OpenBatch):
            self.batch.budget = _cache_tokens(self.batch.decode_step.model, share)
            self.context = min(self._longest, self.batch.budget)

    def prompt(self, turns: list[tuple[str, str]]) -> list[int]:
        """The tokens that the response to a conversation follows.

        Raises:
            HpcRlhfError: the chat template refuses the conversation.
        """
        return token_ids(self.tokenizer, [prompt_text(self.tokenizer, turns)])[0]

    def stream(self, turns: list[tuple[str, str]], max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """The response in a conversation, streamed in pieces of text.

        Args:
            turns: (role, text) with roles ``human`` and ``assistant``; the last one is the human's.
            max_tokens: longest response. A conversation that leaves no room for it loses its oldest tokens.
            temperature: 0 always takes the most likely token.
        """
        ids = self.prompt(turns)
        max_tokens = min(max_tokens, self.context - 1)
        ids = ids[max(0, len(ids) + max_tokens - self.context) :]
        request = Request(ids, max_tokens, sampling_at(temperature), (seed, "chat", len(turns)))
        yield from self._text(self._tokens(request))

    def forgotten(self, turns: list[tuple[str, str]], max_tokens: int) -> int:
        """How many of a conversation's oldest tokens ``stream`` leaves out because the model's context is too short."""
        return max(0, len(self.prompt(turns)) + min(max_tokens, self.context - 1) - self.context)

    def _tokens(self, request: Request) -> Iterator[int]:
        """A request's tokens as they are drawn."""
        self.batch.add(request)
        try:
            while not self.batch.is_finished(request):
                if request in self.batch.advance():
                    yield request.tokens[-1]
        finally:
            self.batch.remove(request)

    def _text(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of a response's tokens, in pieces that are final."""
        text = TextStream(self.tokenizer)
        for token in tokens:
            if piece := text.push(token):
                yield piece
            if text.ended:
                return
        if rest := text.finish():
            yield rest


def _load(folder: Path, eos_id: int) -> OpenBatch:
    """A batch of responses by a model in this process."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", trust_remote_code=False)
    model = model.to(device).eval()
    packed_attention.enable(model)
    rotary.separate(model)
    step = DecodeStep(model, may_trace=device.type == "cuda")
    trial.choose(step, int, is_main=True)
    return OpenBatch(step, eos_id, _cache_tokens(model))


def _cache_tokens(model: Any, share: float = 1.0) -> int:
    """For how many tokens there is a cache in a share of the free memory."""
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else free_memory()
    return int(share * CACHE_SHARE * free) // bytes_per_token(model)
