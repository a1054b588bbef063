"""Responses as text, for people to read: samples.jsonl."""

from __future__ import annotations

import json
from typing import Any

from hpc_rlhf.train.checkpoint.store import Checkpoint
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.further import columns_of
from hpc_rlhf.train.metrics import keep_until
from hpc_rlhf.train.rewards.source import RewardSource
from hpc_rlhf.train.rollout.backend import GenerationRequest, RolloutBackend, Sampling
from hpc_rlhf.train.rollout.experience import Evaluated

# Responses to keep of each rollout.
PER_ROLLOUT = 2
# Held-out prompts that the model answers when a stage ends, as it was before training and after.
HELD_OUT_PROMPTS = 16


class SampleLog:
    """Writes a stage's samples.jsonl, on rank 0.

    Args:
        checkpoint: what the stage resumes from; lines of later steps are removed.
    """

    def __init__(self, context: StageContext, checkpoint: Checkpoint | None) -> None:
        self.context = context
        if context.world.is_main:
            keep_until(context.files.samples, checkpoint.step if checkpoint else -1)

    def text(self, ids: list[int]) -> str:
        text: str = self.context.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def append_rollout(self, step: int, experience: Evaluated) -> None:
        """Keep a few responses of a step's rollout."""
        rollout, records = experience.rollout, []
        for row in range(min(PER_ROLLOUT, len(rollout))):
            prompt, answer = self.text(rollout.prompts[row]), self.text(rollout.responses[row])
            score = experience.scores[row].item()
            reward = round(score, 4) if score == score else None  # NaN: the reward source gave no score
            records.append({"step": step, "kind": "rollout", "prompt": prompt, "answer": answer, "reward": reward})
        self._append(records)

    def answers(
        self, backend: RolloutBackend, rows: list[dict[str, Any]], rewards: RewardSource | None = None
    ) -> list[dict[str, Any]]:
        """The model's likeliest response to each row's prompt, and its reward if there is a source. Collective."""
        request = GenerationRequest(
            [row["prompt_ids"] for row in rows],
            self.context.spec.data.max_answer_tokens,
            self.context.tokenizer.eos_token_id,
            Sampling(greedy=True),
            should_stop=self.context.stop.should_stop,
        )
        with self.context.stop.cancellable():
            rollout = backend.generate(request)
        answers: list[dict[str, Any]] = [{"answer": self.text(response)} for response in rollout.responses]
        if rewards is not None:
            scores = rewards.score(rollout.prompts, rollout.responses, columns_of(rows))
            for answer, score in zip(answers, scores, strict=True):
                answer["reward"] = None if score is None else round(score, 4)
        return answers

    def append_final(
        self, step: int, rows: list[dict[str, Any]], tuned: list[dict[str, Any]], start: list[dict[str, Any]]
    ) -> None:
        """Keep the trained model's answers next to those of the model it started from."""
        records = []
        for row, after, before in zip(rows, tuned, start, strict=True):
            record = {"step": step, "kind": "final", "prompt": row["prompt"], **after}
            records.append({**record, **{f"sft_{name}": value for name, value in before.items()}})
        self._append(records)

    def _append(self, records: list[dict[str, Any]]) -> None:
        if self.context.world.is_main:
            with self.context.files.samples.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
