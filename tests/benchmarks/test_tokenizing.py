"""Tokenizing survives kills and names a damaged line, as ``make bench-tokens`` measures on far more text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.tokenizing import measure


@pytest.mark.slow
def test_a_small_corpus_is_tokenized_to_the_same_files_after_a_kill(tmp_path: Path) -> None:
    facts = measure(tmp_path, 2 * 10**6, kills=1, rounds=1)
    assert facts["tokens"] > 10**5
    assert facts["same_after_kills"]
    assert facts["names_the_line"], facts["damage"]
    assert "Traceback" not in facts["damage"]
