"""The memory that ``plan`` estimates matches real stages in a few small cases; ``make plan-check`` runs all."""

from __future__ import annotations

import pytest

from tests.benchmarks.plan_peaks import OVER, UNDER, VERIFIED, Case, compare

pytestmark = pytest.mark.train

# Most in float32, which every processor computes fast.
CASES = (
    Case("reward", "opt", 2, 128, 1024, 64, 2, {"micro_batch": 4, "zero": 2}),
    Case("ppo", "qwen2", 2, 128, 1024, 32, fields={"micro_batch": 2, "global_batch": 4, "precision": "fp32"}),
    Case("grpo", "llama", 2, 128, 1024, 32, fields={"micro_batch": 4, "precision": "fp32", **VERIFIED}),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_estimate_is_close_to_the_peak(case: Case) -> None:
    (ratio,) = compare([case])
    assert 1 - UNDER <= ratio <= 1 + OVER
