"""Talking to a finished model on one machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from hpc_rlhf.train.data.dialogues import prompt_text, token_ids
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.rollout.backend import GenerationRequest, Sampling
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.decoding import decode

# A model without a chat template that goes on with a turn of its own for the person is cut there.
NEXT_TURN = "\n\nHuman:"


class ChatModel:
    """A model's folder, loaded to answer: on a GPU if there is one.

    Args:
        folder: a Hugging Face folder, as the stages write them.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        self.model = model.to(self.device).eval()
        packed_attention.enable(self.model)

    def stream(
        self, turns: list[tuple[str, str]], max_tokens: int, temperature: float, seed: int
    ) -> Iterator[str]:
        """The answer to a conversation, in pieces of text as they come.

        Args:
            turns: (role, text) with roles ``human`` and ``assistant``; the last one is the human's.
            max_tokens: longest answer. A conversation that leaves no room for it loses its oldest tokens; see
                ``forgotten``.
            temperature: 0 takes the likeliest token each time.
            seed: of the sampling.
        """
        (ids,) = token_ids(self.tokenizer, [prompt_text(self.tokenizer, turns)])
        max_tokens = min(max_tokens, self._places - 1)
        ids = ids[max(0, len(ids) + max_tokens - self._places) :]
        sampling = Sampling(temperature=temperature or 1.0, greedy=temperature == 0)
        request = GenerationRequest(
            [ids], max_tokens, self.tokenizer.eos_token_id, sampling, keys=[(seed, "chat", len(turns))]
        )
        steps = decode(DecodeStep(self.model), request)
        yield from self._text(token for tokens in steps for _, token in tokens)

    def forgotten(self, turns: list[tuple[str, str]], max_tokens: int) -> int:
        """Tokens of a conversation that ``stream`` leaves out, the oldest, because the model has no room for them."""
        (ids,) = token_ids(self.tokenizer, [prompt_text(self.tokenizer, turns)])
        return max(0, len(ids) + min(max_tokens, self._places - 1) - self._places)

    @property
    def _places(self) -> int:
        """Tokens of a conversation with its answer, at most."""
        return getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize

    def _text(self, tokens: Iterator[int]) -> Iterator[str]:
        """Text of tokens as soon as it is sure: whole characters, and nothing that may begin another turn."""
        drawn: list[int] = []
        given = ""
        for token in tokens:
            drawn.append(token)
            whole = self.tokenizer.decode(drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text, next_turn, _ = (
                (whole, "", "") if self.tokenizer.chat_template else whole.partition(NEXT_TURN)
            )
            sure = _sure(text).lstrip()
            if len(sure) > len(given) and sure.startswith(given):
                yield sure[len(given) :]
                given = sure
            if next_turn:
                return


def _sure(text: str) -> str:
    """The text without an end that is half a character, space, or what may become the person's next turn."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    for length in range(len(NEXT_TURN) - 1, 0, -1):
        if text.endswith(NEXT_TURN[:length]):
            text = text[:-length]
            break
    return text.rstrip()
