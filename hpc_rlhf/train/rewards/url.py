"""Rewards by a server; docs/rewards.md describes request and response."""

from __future__ import annotations

import os
from collections.abc import Callable

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.train.rewards import http_client
from hpc_rlhf.train.rewards.text import Failure, Score, TextBatch
from hpc_rlhf.train.rewards.workers import Pool

BATCH, CONNECTIONS = 64, 4


class UrlReward:
    """The scores from a server. It gets batches of up to ``BATCH`` responses, ``CONNECTIONS`` at a time.

    Args:
        secret: the environment variable with the bearer token, if it needs one.
        timeout: seconds for a batch.
        should_stop: polled while waiting.

    Attributes:
        pool: the processes that ask the server.

    Raises:
        HpcRlhfError: the variable is not set.
        WorkCancelled: ``should_stop`` returned True.
    """

    def __init__(self, url: str, secret: str | None, timeout: float, should_stop: Callable[[], bool] = bool) -> None:
        token = "" if secret is None else os.environ.get(secret, "")
        if secret is not None and not (token.isascii() and token.isprintable() and token):
            hint = "export it where you submit, or in slurm.setup"
            raise HpcRlhfError(f"the environment variable {secret} has no token", where=f"url {url}", hint=hint)
        tries = len(http_client.PAUSES) + 1
        self.pool = Pool(
            "hpc_rlhf.train.rewards.http_client:make", {"url": url, "secret": secret, "timeout": timeout},
            size=CONNECTIONS, timeout=tries * (timeout + http_client.LONGEST_PAUSE), should_stop=should_stop,
        )  # fmt: skip

    def judge(self, batch: TextBatch) -> list[Score]:
        parts = [slice(first, first + BATCH) for first in range(0, len(batch), BATCH)]
        requests = [
            {
                "prompts": batch.prompts[part],
                "responses": batch.responses[part],
                "columns": {name: column[part] for name, column in batch.columns.items()},
            }
            for part in parts
        ]
        scores: list[Score] = []
        for request, outcome in zip(requests, self.pool.map(requests), strict=True):
            if isinstance(why := outcome.error or outcome.value, str):
                scores += [Failure(why, RUN_FAILED)] * len(request["responses"])
            else:
                scores += outcome.value
        return scores
