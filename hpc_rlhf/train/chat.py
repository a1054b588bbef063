"""Chat with a finished model on one machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from hpc_rlhf.train.data.dialogues import token_ids
from hpc_rlhf.train.data.templates import prompt_text
from hpc_rlhf.train.models import packed_attention, rotary
from hpc_rlhf.train.plain_turns import drop_plain
from hpc_rlhf.train.rollout.backend import GenerationRequest, Sampling
from hpc_rlhf.train.rollout.in_process import trial
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.decoding import decode

# The response of a model without a chat template ends where it writes a turn for the user.
NEXT_TURN = "\n\nHuman:"


class ChatModel:
    """A model loaded for chat from a Hugging Face folder, on a GPU if there is one."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = drop_plain(AutoTokenizer.from_pretrained(str(folder)))
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        self.model = model.to(self.device).eval()
        packed_attention.enable(self.model)
        rotary.separate(self.model)
        self._step = DecodeStep(self.model)
        trial.choose(self._step, int, is_main=True)
        # Maximum tokens of a conversation with its response.
        self._context_length: int = getattr(model.config, "max_position_embeddings", None) or sys.maxsize

    def stream(self, turns: list[tuple[str, str]], max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """The response in a conversation, streamed in pieces of text.

        Args:
            turns: (role, text) with roles ``human`` and ``assistant``; the last one is the human's.
            max_tokens: longest response. A conversation that leaves no room for it loses its oldest tokens.
            temperature: 0 always takes the most likely token.
        """
        (ids,) = token_ids(self.tokenizer, [prompt_text(self.tokenizer, turns)])
        max_tokens = min(max_tokens, self._context_length - 1)
        ids = ids[max(0, len(ids) + max_tokens - self._context_length) :]
        sampling = Sampling(temperature=temperature or 1.0, greedy=temperature == 0)
        request = GenerationRequest(
            [ids], max_tokens, self.tokenizer.eos_token_id, sampling, keys=[(seed, "chat", len(turns))]
        )
        steps = decode(self._step, request)
        yield from self._text(token for tokens in steps for _, token in tokens)

    def forgotten(self, turns: list[tuple[str, str]], max_tokens: int) -> int:
        """How many of a conversation's oldest tokens ``stream`` leaves out because the model's context is too short."""
        (ids,) = token_ids(self.tokenizer, [prompt_text(self.tokenizer, turns)])
        return max(0, len(ids) + min(max_tokens, self._context_length - 1) - self._context_length)

    def _text(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of tokens, as soon as it is final: whole characters, and nothing that may begin another turn."""
        received: list[int] = []
        sent = ""
        for token in tokens:
            received.append(token)
            whole = self.tokenizer.decode(received, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text, next_turn, _ = (whole, "", "") if self.tokenizer.chat_template else whole.partition(NEXT_TURN)
            final = _final_part(text).lstrip()
            if len(final) > len(sent) and final.startswith(sent):
                yield final[len(sent) :]
                sent = final
            if next_turn:
                return


def _final_part(text: str) -> str:
    """The text without an end that is half a character, white space, or the possible start of the user's next turn."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    for length in range(len(NEXT_TURN) - 1, 0, -1):
        if text.endswith(NEXT_TURN[:length]):
            text = text[:-length]
            break
    return text.rstrip()
