"""What the sources of stages yield, for people to look at: ``python -m hpc_rlhf.train.preview``.

Standard input is JSON: a ``spec``, the ``stages`` whose data is read, and how many ``rows`` of each source are shown.
The last line of output is JSON: ``data`` and ``notes``, or the arguments of an HpcRlhfError as ``error``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.row_counts import Outcome, SourceCounts
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.stages import Data, PretrainSpec, RewardSpec, kind_of
from hpc_rlhf.train import survey
from hpc_rlhf.train.data import sources, texts
from hpc_rlhf.train.data.sequences import Sequences, predicted
from hpc_rlhf.train.data.text_parts import TextSource
from hpc_rlhf.train.data.token_files import SPLITS, Segment, TokenStream
from hpc_rlhf.train.data.tokenized import encoded, ends_turns, learned_tokens
from hpc_rlhf.train.runtime.alone import Alone

# A sequence as the model sees it: what it is, its token ids, and True for each that is learned: (tokens,).
MaskedIds = tuple[str, Sequence[int], np.ndarray]


@dataclass
class Yield:
    """What a source yields in a stage.

    Attributes:
        counts: what became of its rows.
        lengths: how many sequences have a length in tokens, by the lower bound of its bin.
        shown: the first rows, as the model sees them.
    """

    counts: SourceCounts
    splits: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    lengths: Counter[int] = field(default_factory=Counter)
    shown: list[dict[str, Any]] = field(default_factory=list)

    def add(self, split: str, lengths: Sequence[int]) -> None:
        """Count a row of some sequences."""
        self.splits[split].update(rows=1, tokens=sum(lengths))
        self.lengths.update(map(bin_of, lengths))

    def show(self, split: str, sequences: Sequence[MaskedIds], tokenizer: Any) -> None:
        """Add a row to those that are shown."""
        parts = [
            {"name": name, "tokens": len(ids), "parts": _parts(ids, learned, tokenizer)}
            for name, ids, learned in sequences
        ]
        self.shown.append({"split": split, "sequences": parts})

    def to_dict(self) -> dict[str, Any]:
        lengths = [{"from": low, "below": _next_bin(low), "sequences": n} for low, n in sorted(self.lengths.items())]
        splits = {split: {"rows": count["rows"], "tokens": count["tokens"]} for split, count in self.splits.items()}
        return {**self.counts.to_dict(), "splits": splits, "lengths": lengths, "shown": self.shown}


def bin_of(tokens: int) -> int:
    """The lower bound of a length's bin. Bins begin at 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …"""
    if tokens < 2:
        return tokens
    power: int = 1 << tokens.bit_length() - 1
    return power + power // 2 if tokens >= power + power // 2 else power


def _next_bin(low: int) -> int:
    is_power = low & (low - 1) == 0
    return max(low + 1, low * 3 // 2 if is_power else low * 4 // 3)


def _parts(ids: Sequence[int], learned: np.ndarray, tokenizer: Any) -> list[dict[str, Any]]:
    """The text of a sequence in pieces that are learned or not, in turn."""
    ends = [*(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    parts, before = [], ""
    for end in ends if len(ids) else ():
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append({"text": text[len(before) :], "learned": bool(learned[end - 1])})
        before = text
    return parts


def _last(name: str, ids: Sequence[int], count: int) -> MaskedIds:
    """A sequence of which the last ``count`` tokens are learned."""
    return name, ids, np.arange(len(ids)) >= len(ids) - count


def _sequences(row: dict[str, Any], spec: JobSpec, stage: str | None, data: Data) -> list[MaskedIds]:
    """What a row puts through the model: in a pair, both responses after their prompt; for PPO and GRPO, the prompt.
    A labeled response is named by its label.

    The reward model's mask is True where the scores of a pair are compared.
    """
    prompt = row["prompt_ids"]
    if data is Data.PROMPTS:
        return [_last("prompt", prompt, 0)]
    if data is Data.LABELED:
        return [_last("good" if row["label"] else "bad", prompt + row["chosen_ids"], len(row["chosen_ids"]))]
    settings = None if stage is None else spec.stage(stage)
    if data is Data.ANSWERS:
        learned = learned_tokens(row, getattr(settings, "answer_only", False))
        return [_last("chosen", prompt + row["chosen_ids"], learned)]
    answers = {name: row[f"{name}_ids"] for name in data.answers}
    same = 0
    if isinstance(settings, RewardSpec):
        pairs = zip(*answers.values(), strict=False)
        same = next((n for n, (one, other) in enumerate(pairs) if one != other), min(map(len, answers.values())))
        if settings.loss == "last":
            return [_last(name, prompt + ids, 1) for name, ids in answers.items()]
    return [_last(name, prompt + ids, len(ids) - same) for name, ids in answers.items()]


def of_dialogues(part: survey.Part, spec: JobSpec, tokenizer: Any, rows: int) -> list[Yield]:
    """What each source yields for a stage, or for a mixture.

    Raises:
        HpcRlhfError: a source cannot be read.
    """
    _, stage, counts, samples, data = part
    yields = {id(one): Yield(one) for one in counts}
    for held_out, row, counted in encoded(samples, tokenizer, spec, data, ends_turns(spec, stage)):
        own, split, sequences = yields[id(counted)], SPLITS[held_out], _sequences(row, spec, stage, data)
        own.add(split, [len(ids) for _, ids, _ in sequences])
        if len(own.shown) < rows:
            own.show(split, sequences, tokenizer)
    return list(yields.values())


def of_documents(spec: PretrainSpec, seed: int, tokenizer: Any, rows: int, folder: Path) -> list[Yield]:
    """What each source yields for pretraining; the rows are the first sequences that are learned.

    Args:
        folder: for hashes, and for the tokens of these sequences.

    Raises:
        HpcRlhfError: a source cannot be read.
    """
    yields: dict[TextSource, Yield] = {}
    first: dict[TextSource, Segment] = {}
    for part in texts.compared(spec, seed, tokenizer, folder, Alone()):  # type: ignore[arg-type]
        own = yields.setdefault(part.text, Yield(SourceCounts(part.text.source.name)))
        packed = first.setdefault(part.text, Segment(own.counts))
        for sample in part.samples(bool):
            sample.count_in(own.counts)
            if sample.ids is not None:
                split = SPLITS[sample.outcome is Outcome.HELD_OUT]
                own.add(split, [len(sample.ids)])
                if split == SPLITS[0] and packed.size <= rows * spec.sequence_length:
                    packed.add(sample.ids, split)
    for number, (text, packed) in enumerate(first.items()):
        facts = packed.write(folder / f"shown-{number}", 0, ends_part=True)
        stream = TokenStream(folder, [facts], SPLITS[0], text.encoder.dtype)
        sequences = Sequences([stream], spec.sequence_length, spec.cross_documents)
        for row in (sequences[index] for index in range(min(rows, len(sequences)))):
            learned = np.zeros(len(row["ids"]), dtype=bool)
            learned[predicted(row["documents"])] = True
            yields[text].show(SPLITS[0], [("text", row["ids"].tolist(), learned)], tokenizer)
    return list(yields.values())


def preview(spec: JobSpec, stages: Sequence[str], rows: int) -> dict[str, Any]:
    """What the sources of some stages yield: ``data``, by the stage or the field that they are for, and ``notes``.

    Args:
        rows: rows of each source to show.

    Raises:
        HpcRlhfError: a source cannot be read, or the tokenizer is not on this machine.
    """
    data: dict[str, list[Yield]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            settings, kind = spec.stage(stage), kind_of(stage).data
            tokenizer = survey.tokenizer_of(spec, Path(folder) / "tokenizer", kind)
            if isinstance(settings, PretrainSpec):
                data[f"stages.{stage}"] = of_documents(settings, spec.seed, tokenizer, rows, Path(folder))
            for part in survey.parts(spec):
                if part[0].split(".")[1] == stage:
                    data[part[0]] = of_dialogues(part, spec, tokenizer, rows)
    notes = [f"{path}: {text}" for path, one in spec.sources.items() for text in sources.unread(one)]
    notes += [f"{path}: {text}" for path, yields in data.items() for one in yields for text in one.counts.warnings()]
    return {"data": {path: [one.to_dict() for one in yields] for path, yields in data.items()}, "notes": notes}


def main() -> None:
    asked = json.load(sys.stdin)
    spec = JobSpec.model_validate(asked["spec"])
    if not any(hub.missing(item) for item in hub.items(spec)):
        os.environ.setdefault(hub.OFFLINE, "1")
    try:
        answer = preview(spec, asked["stages"], asked["rows"])
    except HpcRlhfError as error:
        answer = {"error": [error.message, error.where, error.hint, error.exit_code]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
