"""Responses as text, for people to read: samples.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.rollout.backend import GenerationRequest, Rollout, RolloutBackend, Sampling
from hpc_rlhf.train.rollout.experience import Experience

# Responses to keep of each rollout.
PER_ROLLOUT = 2
# Held-out prompts that the models from before and after training answer at the end of a stage.
HELD_OUT_PROMPTS = 16


class SampleLog:
    """Writes samples.jsonl of a stage, on rank 0."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self.path = path
        self.tokenizer = tokenizer

    def text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def append(self, records: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def append_rollout(self, step: int, experience: Experience) -> None:
        """Keep a few responses of a step's rollout."""
        rollout = experience.rollout
        self.append(
            [
                {
                    "step": step, "kind": "rollout", "prompt": self.text(rollout.prompts[row]),
                    "answer": self.text(rollout.responses[row]),
                    "reward": _rounded(experience.scores[row].item()),
                }
                for row in range(min(PER_ROLLOUT, len(rollout)))
            ]
        )  # fmt: skip


def _rounded(score: float) -> float | None:
    return round(score, 4) if score == score else None  # NaN: the reward source gave no score


def held_out_prompts(data: Any) -> list[dict[str, Any]]:
    """The held-out rows whose prompts are answered at the end."""
    return [data[i] for i in range(min(HELD_OUT_PROMPTS, len(data)))]


def greedy_responses(context: StageContext, backend: RolloutBackend, rows: list[dict[str, Any]]) -> Rollout:
    """Each row's prompt with the model's likeliest response. Collective."""
    request = GenerationRequest(
        [row["prompt_ids"] for row in rows],
        context.spec.data.max_answer_tokens,
        context.tokenizer.eos_token_id,
        Sampling(greedy=True),
        should_stop=context.stop.should_stop,
    )
    with context.stop.cancellable():
        return backend.generate(request)
