"""Rewards by a finished reward model of any family: it reads the dialogue as text, in the form it was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec import model_files
from hpc_rlhf.train.data.dialogues import configure_tokenizer, encode, token_ids
from hpc_rlhf.train.data.further import PROMPT
from hpc_rlhf.train.data.rows import Sample, turns_of
from hpc_rlhf.train.data.templates import Renderer
from hpc_rlhf.train.models.loading import exit_code_of
from hpc_rlhf.train.plain_turns import is_plain
from hpc_rlhf.train.rewards.text import Failure, Score, TextBatch
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled


class ClassifierReward:
    """The scores of a sequence classification model of transformers with one label. Every rank holds the whole model.

    It reads the dialogue with the response in its own chat template; without one, as a transcript.

    Args:
        source: a hub id or a folder.
        budget: tokens of a forward pass, padding included.
        should_stop: polled between forward passes.

    Raises:
        HpcRlhfError: it cannot be loaded, or is not such a model.
        WorkCancelled: ``should_stop`` returned True.
    """

    def __init__(
        self, source: str, dtype: torch.dtype, device: torch.device, budget: int, should_stop: Callable[[], bool] = bool
    ) -> None:
        self.model, self.tokenizer = _load(source, dtype)
        self.model.eval().requires_grad_(False).to(device)
        self.device, self.budget, self.should_stop = device, budget, should_stop
        self._config = self.model.config.get_text_config()
        # Reward models trained by this package read a dialogue up to EOS, without what a template adds after it.
        self._ends = is_plain(self.tokenizer) or hasattr(self.model.config, "score_offset")
        if self._ends:
            configure_tokenizer(self.tokenizer, "auto")
            if self._config.pad_token_id == self.tokenizer.eos_token_id:
                self._config.pad_token_id = None  # transformers would take the score before the last EOS
        self._renderer = Renderer(self.tokenizer)

    def judge(self, batch: TextBatch) -> list[Score]:
        dialogues = zip(batch.column(PROMPT), batch.responses, strict=True)
        rows = [self.token_ids(prompt, response) for prompt, response in dialogues]
        longest = getattr(self._config, "max_position_embeddings", None) or math.inf
        scores: list[Score] = [Failure(f"reads {longest} tokens, and the dialogue has {len(ids)}") for ids in rows]
        for part in self._passes([row for row, ids in enumerate(rows) if len(ids) <= longest], rows):
            if self.should_stop():
                raise WorkCancelled
            for row, value in zip(part, self._values([rows[row] for row in part]), strict=True):
                scores[row] = value
        return scores

    def token_ids(self, prompt: str, response: str) -> list[int]:
        """A dialogue as the model reads it.

        Args:
            prompt: a transcript that ends where the response begins.
        """
        turns = turns_of(prompt)
        if self._ends:
            (tokens,) = encode([Sample(turns, prompt, f" {response}")], self.tokenizer, "chosen")
            if tokens is not None:
                return [*tokens.prompt, *tokens.responses[0]]
        return token_ids(self.tokenizer, [self._renderer.whole([*turns, ("assistant", response)])])[0]

    def _passes(self, chosen: Sequence[int], rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The rows of each forward pass, the longest first."""
        passes: list[list[int]] = []
        for row in sorted(chosen, key=lambda row: -len(rows[row])):
            # Without a padding token, transformers takes one row at a time.
            full = passes and (len(passes[-1]) + 1) * len(rows[passes[-1][0]]) > self.budget
            if not passes or full or self._config.pad_token_id is None:
                passes.append([])
            passes[-1].append(row)
        return passes

    @torch.no_grad()
    def _values(self, rows: Sequence[Sequence[int]]) -> list[float]:
        longest, padding = max(map(len, rows)), self._config.pad_token_id
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(longest, device=self.device) < lengths.unsqueeze(1)
        logits = self.model(input_ids=ids, attention_mask=mask.long()).logits
        values: list[float] = (logits[:, 0].float() - getattr(self.model.config, "score_offset", 0.0)).tolist()
        return values


def _load(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.num_labels != 1:
            raise HpcRlhfError(model_files.not_one(config.num_labels), where=source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise HpcRlhfError(
            f"the reward model could not be loaded ({str(error).splitlines()[0]})",
            where=source,
            hint="give a hub id that this node can reach or has cached, or a folder with a model and its tokenizer",
            exit_code=exit_code_of(error, source),
        ) from error
    if missing := sorted(info["missing_keys"]):
        hint = "give a reward model: a model for sequence classification, trained with one label"
        raise HpcRlhfError(f"the model's files lack the weights {missing[0]}", where=source, hint=hint)
    return model, tokenizer
