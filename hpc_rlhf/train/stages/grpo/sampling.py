"""Sampling and scoring the groups of responses that a step learns from.

Prompts come from an endless stream, in its order. The places in a step's minibatches are numbered over all ranks, and
each rank fills its own, so that the minibatches are the same for any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpc_rlhf.spec.stages import GrpoSpec
from hpc_rlhf.train.algorithms.group_advantages import varied
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.data.arrow import Rows
from hpc_rlhf.train.data.further import columns_of
from hpc_rlhf.train.data.sampler import sample_at
from hpc_rlhf.train.rewards.blend import Scores
from hpc_rlhf.train.rollout.backend import Rollout
from hpc_rlhf.train.stages.grpo.metrics import compare
from hpc_rlhf.train.stages.grpo.trainer import GrpoTrainer
from hpc_rlhf.train.stages.policy.rewards import score_metrics
from hpc_rlhf.train.stages.policy.trainer import as_tensor


@dataclass
class Group:
    """The responses to a prompt.

    Attributes:
        varied: whether their scores differ.
    """

    prompt: list[int]
    responses: list[list[int]]
    log_probs: list[list[float]] | None
    scores: list[float | None]
    failed: list[bool]
    varied: bool


@dataclass
class Sampler:
    """Fills a step's places with groups."""

    context: StageContext
    spec: GrpoSpec
    trainer: GrpoTrainer
    rows: Rows
    metrics: dict[str, float | None] = field(default_factory=dict)

    def sample(self) -> tuple[Rollout, Scores]:
        """The groups of this rank's places. Collective.

        With dynamic sampling, the next prompts of the stream take the places of those whose scores do not differ, in
        the order of the places. What is replaced depends on scores alone, never on which rank is ready first.

        Raises:
            RolloutCancelled: this rank must stop.
        """
        places = self.places()
        groups = self._fill(self._positions(), first=True)
        world, count = self.context.world, self.prompts
        self.trainer.position += count
        resampled = 0
        for _ in range(self.spec.dynamic_sampling or 0):
            flat = [place for place in places if not groups[place].varied]
            holes = sorted(place for own in world.gather_data(flat) for place in own)
            if not holes:
                break
            position = {place: self.trainer.position + number for number, place in enumerate(holes)}
            groups |= self._fill({place: position[place] for place in flat})
            self.trainer.position += len(holes)
            resampled += len(holes)
        if self.spec.dynamic_sampling:
            self.metrics["resampled"] = float(resampled)
        return joined([groups[place] for place in places])

    def next_prompts(self) -> tuple[list[list[int]], list[tuple[object, ...]]]:
        """The prompts that ``sample`` asks for first, and what seeds their responses."""
        rows, keys = self._asked(list(self._positions().values()))
        return [row["prompt_ids"] for row in rows], keys

    @property
    def prompts(self) -> int:
        """Prompts per step, over all ranks."""
        return self.context.batch.global_ * self.spec.minibatches // self.spec.group_size

    def places(self) -> list[int]:
        """The numbers of this rank's places, in the order of its minibatches."""
        world, size = self.context.world, self.context.batch.global_
        whole = size // world.dims.data % self.spec.group_size == 0  # otherwise a group is in several minibatches
        blocks = self.spec.minibatches if whole else 1
        block = self.prompts // blocks
        own = block // world.dims.data
        return [number * block + world.data_rank * own + i for number in range(blocks) for i in range(own)]

    def _positions(self) -> dict[int, int]:
        """The positions in the stream of the first prompts for this rank's places."""
        return {place: self.trainer.position + place for place in self.places()}

    def _asked(self, positions: list[int]) -> tuple[list[dict[str, Any]], list[tuple[object, ...]]]:
        """A row for each response to the prompts at some positions, and what seeds it."""
        seed, size = self.context.spec.seed, self.spec.group_size
        rows = [
            self.rows[sample_at(position, len(self.rows), seed, "grpo")] for position in positions for _ in range(size)
        ]
        return rows, [(seed, "rollout", position, i) for position in positions for i in range(size)]

    def _fill(self, positions: dict[int, int], first: bool = False) -> dict[int, Group]:
        """A group for each place, given its prompt's position in the stream. Collective."""
        size, trainer = self.spec.group_size, self.trainer
        # A rank without a prompt answers one that does not count: the forward passes may be collective.
        rows, keys = self._asked(list(positions.values()) or [trainer.position])
        with self.context.stop.cancellable():
            prompts = [row["prompt_ids"] for row in rows]
            rollout = trainer.roll_out(prompts, keys, self.context.stop.should_stop, size)
        columns = columns_of(rows)
        if not positions:
            rollout, columns = Rollout.of([], [], self.context.world.device), {name: [] for name in columns}
        scored = trainer.score(rollout, columns)
        world, numbers = self.context.world, trainer.groups(rollout)
        scores = as_tensor(scored.total, world.device)
        if first:  # only these are a fair sample: later prompts replace some because of their scores
            self.metrics = {**compare(scores, numbers, world), **score_metrics(scored, world)}
        groups, log_probs = [], rollout.response_log_probs
        for number, differs in enumerate(varied(scores, numbers).tolist()):
            own = slice(number * size, (number + 1) * size)
            prompt, responses = rollout.prompts[own][0], rollout.responses[own]
            sampler = None if log_probs is None else log_probs[own]
            groups.append(Group(prompt, responses, sampler, scored.total[own], scored.failed[own], differs))
        return dict(zip(positions, groups, strict=True))


def joined(groups: list[Group]) -> tuple[Rollout, Scores]:
    """Groups as one rollout."""
    prompts = [group.prompt for group in groups for _ in group.responses]
    responses = [response for group in groups for response in group.responses]
    log_probs = [row for group in groups for row in group.log_probs or ()]
    rollout = Rollout.of(prompts, responses, log_probs=log_probs or None)
    total = [score for group in groups for score in group.scores]
    return rollout, Scores(total, {}, [failed for group in groups for failed in group.failed])
