"""What a run's votes say: win rates of pairs of models, shares of thumbs, and the votes as a table."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hpc_rlhf import intervals
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.intervals import Interval
from hpc_rlhf.run import feedback
from hpc_rlhf.run.feedback import RatedModel, Vote
from hpc_rlhf.run.layout import RunDir

_COLUMNS = (
    "id", "time", "kind", "model", "other_model", "vote", "comment", "user", "prompt", "response", "other_response",
    "temperature", "top_p", "max_tokens", "seed",
)  # fmt: skip
# With these, a cell of a table is a formula for spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class PairResult:
    """How a model does against another, by the votes.

    Attributes:
        win_rate: a vote for neither (a tie, or both bad) counts half. None for two responses of one model, where each
            vote for one of them is a win and a loss.
    """

    model: str
    against: str
    wins: int
    losses: int
    ties: int
    both_bad: int
    win_rate: Interval | None


@dataclass(frozen=True)
class ThumbsResult:
    """What votes say of a model's responses by themselves."""

    model: str
    up: int
    down: int
    liked: Interval


def votes_of(run: RunDir, chosen: Callable[[Vote], bool]) -> tuple[list[Vote], int]:
    """The chosen votes of a run, and the number of damaged lines.

    Raises:
        HpcRlhfError: they may not be read.
    """
    try:
        read = [vote for _, vote in feedback.read(run.feedback) if vote is None or chosen(vote)]
    except OSError as error:
        raise HpcRlhfError(f"cannot be read: {error.strerror}", where=str(error.filename or run.feedback)) from error
    votes = [vote for vote in read if vote is not None]
    return votes, len(read) - len(votes)


def pair_results(votes: Sequence[Vote]) -> list[PairResult]:
    """A result for each pair of models; the first in the alphabet is the one with the win rate."""
    names = _names(votes)
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if vote.kind == "pair":
            left, right = (names(model) for model in vote.models)
            swapped = left > right
            result = {"left": "losses" if swapped else "wins", "right": "wins" if swapped else "losses"}
            counts[(right, left) if swapped else (left, right)][result.get(vote.vote, vote.vote)] += 1
    return [_pair_result(*pair, one) for pair, one in sorted(counts.items())]


def _pair_result(model: str, against: str, counts: Counter[str]) -> PairResult:
    wins, losses, neither = counts["wins"], counts["losses"], (counts["tie"], counts["both_bad"])
    if model == against:
        return PairResult(model, against, wins + losses, wins + losses, *neither, None)
    rate = intervals.share(wins + sum(neither) / 2, counts.total())
    return PairResult(model, against, wins, losses, *neither, rate)


def thumbs_results(votes: Sequence[Vote]) -> list[ThumbsResult]:
    """A result for each model."""
    names = _names(votes)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if vote.kind == "thumbs":
            counts[names(vote.models[0])][vote.vote] += 1
    return [
        ThumbsResult(model, one["up"], one["down"], intervals.share(one["up"], one.total()))
        for model, one in sorted(counts.items())
    ]


def as_csv(votes: Iterable[Vote]) -> str:
    """The votes as a table for spreadsheets. A text that one would take for a formula gets a ' before it."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(_COLUMNS)
    for vote in votes:
        models, responses = [model.name for model in vote.models], vote.responses
        cells = [
            vote.id, vote.time, vote.kind, models[0], "".join(models[1:]), vote.vote, vote.comment, vote.user or "",
            vote.messages[-1].content, responses[0], "".join(responses[1:]), *vote.sampling.model_dump().values(),
        ]  # fmt: skip
        table.writerow([f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in cells])
    return text.getvalue()


def _names(votes: Iterable[Vote]) -> Callable[[RatedModel], str]:
    """Gives the name of a model, with the beginning of its manifest's hash if several had that name."""
    manifests: dict[str, set[str]] = defaultdict(set)
    for vote in votes:
        for model in vote.models:
            manifests[model.name].add(model.manifest)
    return lambda model: model.name if len(manifests[model.name]) == 1 else f"{model.name} ({model.manifest[:8]})"
