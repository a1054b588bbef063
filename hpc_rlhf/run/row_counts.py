"""What became of the rows of the data: how many a stage trained on, left out or changed, and why.

Every row that is read has one outcome in a stage that is not a change, so that their counts add up to the rows read;
changes are counted besides. The tokenized data's manifest keeps the counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

from hpc_rlhf.run import manifest
from hpc_rlhf.run.layout import StageDir


class Kind(Enum):
    """What an outcome means for the user's data."""

    USED = auto()
    PASSED = auto()  # left out on purpose, such as rows of another stage
    LOST = auto()  # left out before it is known which stage would train on it
    LOST_HERE = auto()  # left out of the stage's own rows
    CHANGED = auto()  # used, but not as it is


class Outcome(Enum):
    """What became of a row: the word that is stored, its kind, and a description that follows a number of rows."""

    TRAINED = "trained", Kind.USED, "trained on"
    HELD_OUT = "held out", Kind.USED, "held out for evaluation"

    OTHER_STAGE = "other stage", Kind.PASSED, "for other stages"
    NOT_DRAWN = "not drawn", Kind.PASSED, "not drawn, by the weight of the source"
    REPEATED = "repeated", Kind.PASSED, "with a prompt that the stage already has"
    HELD_OUT_TWICE = "held out twice", Kind.PASSED, "that are held out already"
    NO_PROMPT = "no prompt", Kind.PASSED, "of plain text, which has no prompt"
    ONE_ANSWER = "one answer", Kind.PASSED, "without a second response"
    NO_LABEL = "no label", Kind.PASSED, "with a response, but no label of it"

    TIE = "tie", Kind.PASSED, "whose vote is a tie"
    BOTH_BAD = "both bad", Kind.PASSED, "whose vote calls both responses bad"
    THUMBS = "thumbs", Kind.PASSED, "with a vote on one response"
    COMPARISON = "comparison", Kind.PASSED, "with a vote on two responses"

    REPEATED_TEXT = "repeated text", Kind.PASSED, "equal to an earlier one"
    TOO_FEW_CHARACTERS = "too few characters", Kind.PASSED, "shorter than filters.min_characters"
    TOO_MANY_CHARACTERS = "too many characters", Kind.PASSED, "longer than filters.max_characters"
    FEW_LETTERS = "few letters", Kind.PASSED, "with a smaller share of letters than filters.min_letters"
    REPEATED_LINES = "repeated lines", Kind.PASSED, "that repeat more of their lines than filters.max_repeated"
    COMMON_LINES = "common lines", Kind.PASSED, "with no line but those that max_line_documents leaves out"
    COMPRESSIBLE = "compressible", Kind.PASSED, "that zlib makes more than filters.max_compression times smaller"

    NULL = "null", Kind.LOST, "with null where text is needed"
    EMPTY = "empty", Kind.LOST, "without text"
    NO_ANSWER = "no answer", Kind.LOST, "without a response"
    USER_LAST = "user last", Kind.LOST, "that end with the user's turn"
    DAMAGED = "damaged", Kind.LOST, "that a crash cut short"
    NO_COMMON_PROMPT = "no common prompt", Kind.LOST, "without a prompt, and whose responses do not show one"

    PROMPT_ONLY = "prompt only", Kind.LOST_HERE, "of a prompt without a response"
    BAD_ANSWER = "bad answer", Kind.LOST_HERE, "with a response that its label calls bad"

    NO_REJECTED = "no rejected", Kind.LOST_HERE, "whose rejected response is null, empty or not the model's"
    SAME_ANSWERS = "same answers", Kind.LOST_HERE, "with the same response twice"
    PROMPTS_DIFFER = "prompts differ", Kind.LOST_HERE, "with a different prompt for each response"
    TOO_LONG = "too long", Kind.LOST_HERE, "with a prompt longer than data.max_prompt_tokens"

    TEMPLATE = "template", Kind.LOST_HERE, "whose response the chat template does not write as the end of a prompt"

    CUT_LEFT = "cut left", Kind.CHANGED, "with a prompt longer than data.max_prompt_tokens, without its oldest part"
    CUT_RIGHT = "cut right", Kind.CHANGED, "with a response cut on the right to data.max_answer_tokens"

    NO_THINKING = "no thinking", Kind.CHANGED, "whose thinking the chat template leaves out"
    WITHOUT_LINES = "without lines", Kind.CHANGED, "without lines that more than max_line_documents documents have"
    SPLIT = "split", Kind.CHANGED, "of text that is split into pieces"

    def __new__(cls, word: str, kind: Kind, text: str) -> Outcome:
        outcome = object.__new__(cls)
        outcome._value_ = word
        return outcome

    def __init__(self, word: str, kind: Kind, text: str) -> None:
        self.kind, self.text = kind, text


# Changes that the user asked for, or that lose nothing.
_EXPECTED = (Outcome.SPLIT, Outcome.WITHOUT_LINES)
NAMED = (Kind.LOST, Kind.LOST_HERE, Kind.CHANGED)
# The fraction of a source's rows whose loss or change is worth a warning.
MANY = 0.05


@dataclass
class Count:
    """How many rows had an outcome, and where the first and the last of them are."""

    rows: int = 0
    first: str = ""
    last: str = ""


@dataclass
class SourceCounts:
    """The rows of one source in one stage, by outcome.

    Attributes:
        source: the path, hub id or ``demo``.
        ignored: columns that nobody reads although they look like content, each with the first such row.
        rewarded: columns that rewards read.
        lines: lines left out of rows that are used.
    """

    source: str
    outcomes: dict[Outcome, Count] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    rewarded: frozenset[str] = frozenset()
    lines: int = 0

    def add(self, outcome: Outcome, where: str) -> None:
        """Count a row. Several samples of one row, which come one after the other, count once."""
        count = self.outcomes.setdefault(outcome, Count(first=where))
        if count.last != where:
            count.rows, count.last = count.rows + 1, where

    @classmethod
    def total(cls, parts: Sequence[SourceCounts]) -> SourceCounts:
        """The counts of a source whose rows were counted in parts."""
        total = cls(parts[0].source, lines=sum(part.lines for part in parts))
        for outcome, count in ((outcome, count) for part in parts for outcome, count in part.outcomes.items()):
            sum_ = total.outcomes.setdefault(outcome, Count(first=count.first))
            sum_.rows, sum_.last = sum_.rows + count.rows, count.last
        return total

    def rows(self, *kinds: Kind) -> int:
        """The rows with an outcome of these kinds."""
        return sum(count.rows for outcome, count in self.outcomes.items() if outcome.kind in kinds)

    @property
    def read(self) -> int:
        """All rows of the source."""
        return self.rows(*Kind) - self.rows(Kind.CHANGED)

    @property
    def lost(self) -> float:
        """The fraction of the rows meant for the stage that is lost, if those lost before the split were spread
        evenly over the stages."""
        here = self.rows(Kind.LOST_HERE)
        kept_before = 1 - self.rows(Kind.LOST) / max(1, self.read)
        kept_here = 1 - here / max(1, here + self.rows(Kind.USED))
        return 1 - kept_before * kept_here

    def describe(self, *kinds: Kind) -> str:
        """The outcomes of some kinds in words, each of lost and changed rows with its first row."""
        chosen = [(outcome, self.outcomes[outcome]) for outcome in Outcome if outcome in self.outcomes]
        return ", ".join(
            f"{count.rows:,} {outcome.text}" + (f" (first: {count.first})" if outcome.kind in NAMED else "")
            for outcome, count in chosen
            if outcome.kind in kinds
        )

    def summary(self) -> str:
        """All outcomes in words."""
        whole = f"{self.source}: {self.read:,} row{'s' * (self.read != 1)}"
        outcomes = self.describe(Kind.USED, Kind.PASSED, Kind.LOST, Kind.LOST_HERE)
        changed = self.describe(Kind.CHANGED)
        lines = f" ({self.lines:,} lines)" if self.lines else ""
        used = f"; among those used, {changed}{lines}" if changed else ""
        return whole + (f": {outcomes}" if outcomes else "") + used

    def warnings(self) -> list[str]:
        """Sentences on what many rows lose, and on columns that are not read."""
        sentences = [
            f"the column {column} of {self.source} is not read (first: {where})"
            for column, where in sorted(self.ignored.items())
        ]
        if self.lost > MANY:
            what = self.describe(Kind.LOST, Kind.LOST_HERE)
            sentences.append(f"{self.lost:.0%} of the rows of {self.source} are left out: {what}")
        used = self.rows(Kind.USED)
        for outcome, count in self.outcomes.items():
            if outcome.kind is Kind.CHANGED and outcome not in _EXPECTED and count.rows > MANY * used:
                share, first = count.rows / used, count.first
                sentences.append(
                    f"{share:.0%} of the used rows of {self.source} are rows {outcome.text} (first: {first})"
                )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        outcomes = {o.value: {"rows": count.rows, "first": count.first} for o, count in self.outcomes.items()}
        shares = {"rows": self.read, "lost": round(self.lost, 6)}
        return {"source": self.source, **shares, "outcomes": outcomes, "ignored": self.ignored, "lines": self.lines}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> SourceCounts:
        """Read back; outcomes that only another version knows are left out."""
        known = {outcome.value: outcome for outcome in Outcome}
        outcomes = {known[w]: Count(c["rows"], c["first"]) for w, c in facts["outcomes"].items() if w in known}
        return cls(facts["source"], outcomes, facts.get("ignored", {}), lines=facts.get("lines", 0))


def stage_counts(stage: StageDir) -> list[SourceCounts]:
    """The counts of a stage that has tokenized its data, from its newest data of each kind."""
    newest: dict[str, Path] = {}
    for path in sorted(stage.data.glob(f"*/{manifest.NAME}"), key=lambda path: path.stat().st_mtime):
        newest[path.parent.name.rpartition("-")[0]] = path.parent
    return [counts for folder in newest.values() for counts in read_counts(manifest.read(folder) or {})]


def read_counts(facts: Mapping[str, Any]) -> Sequence[SourceCounts]:
    """The counts in the manifest of tokenized data; none in that of an earlier version."""
    return [SourceCounts.of(source) for source in facts.get("sources", ())]
