"""Answers as text, kept for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpc_rlhf.train.rollout.experience import Experience, Rollout

# Prompts of each step whose answers are kept.
KEPT = 2


class SampleLog:
    """samples.jsonl of a PPO stage; written by rank 0."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self.path = path
        self.tokenizer = tokenizer

    def texts(self, rollout: Rollout, row: int) -> tuple[str, str]:
        """Prompt and answer of a row of a rollout."""
        return (
            self.tokenizer.decode(rollout.prompts[row], skip_special_tokens=True),
            self.tokenizer.decode(rollout.answers[row], skip_special_tokens=True),
        )

    def keep(self, records: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def keep_rollouts(self, step: int, made: Experience) -> None:
        """Keep a few answers of a step."""
        records = []
        for row in range(min(KEPT, len(made.scores))):
            prompt, answer = self.texts(made.rollout, row)
            reward = round(made.scores[row].item(), 4)
            records.append(
                {"step": step, "kind": "rollout", "prompt": prompt, "answer": answer, "reward": reward}
            )
        self.keep(records)
