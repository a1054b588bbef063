"""Counts of rows: each row once, and how many are lost."""

from __future__ import annotations

import pytest

from hpc_rlhf.run.row_counts import Outcome, SourceCounts, read_counts


def counts_of(**rows: int) -> SourceCounts:
    counts = SourceCounts("a.jsonl")
    for name, number in rows.items():
        for place in range(number):
            counts.add(Outcome[name], f"a.jsonl, {name} {place}")
    return counts


def test_several_samples_of_a_row_count_once() -> None:
    counts = SourceCounts("a.jsonl")
    for where in ("row 1", "row 1", "row 3"):
        counts.add(Outcome.TRAINED, where)
        counts.add(Outcome.CUT_RIGHT, where)
    assert (counts.outcomes[Outcome.TRAINED].rows, counts.outcomes[Outcome.TRAINED].first) == (2, "row 1")
    assert counts.read == 2, "changed rows are used rows too"


@pytest.mark.parametrize(
    ("rows", "lost"),
    [
        ({}, 0),
        ({"TRAINED": 3, "OTHER_STAGE": 5, "REPEATED": 2}, 0),
        ({"TRAINED": 8, "CUT_LEFT": 8, "PROMPTS_DIFFER": 2}, 0.2),
        ({"TRAINED": 10, "OTHER_STAGE": 80, "NULL": 10}, 0.1),
        ({"TRAINED": 4, "OTHER_STAGE": 2, "HELD_OUT": 1, "SAME_ANSWERS": 5, "USER_LAST": 12}, 0.75),
    ],
)
def test_rows_are_lost_for_a_stage_only_if_it_would_use_them(rows: dict[str, int], lost: float) -> None:
    assert counts_of(**rows).lost == pytest.approx(lost)


def test_counts_are_read_back_and_those_of_other_versions_are_skipped() -> None:
    counts = counts_of(TRAINED=2, NULL=1)
    stored = counts.to_dict()
    stored["outcomes"]["of tomorrow"] = {"rows": 1, "first": "row 9"}
    (again,) = read_counts({"sources": [stored]})
    assert again.to_dict() == counts.to_dict()
    assert not read_counts({"rows": {}})
