"""The extension point for rewards: what scores responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class RewardSource(Protocol):
    """Scores responses; a reward model, a function, a verifier."""

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """A score for each response.

        Collective: all ranks call it together, each with its own responses. Under ``tensor_parallel`` and
        ``sequence_parallel``, the ranks of a group have the same responses and must return the same scores.

        Args:
            prompts, responses: token ids; a source that reads text decodes them.
            columns: further columns of the data by name, with an entry for each prompt, such as a reference answer;
                see ``columns_of``.

        Returns:
            None where there is no score: it is left out of the reward's mean. In PPO it counts as 0, before penalties;
            in GRPO the response takes no part.
        """
