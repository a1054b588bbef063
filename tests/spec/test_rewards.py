"""The rewards of a stage: one kind each, with distinct names."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from hpc_rlhf.spec.rewards import Rewards, names

ADAPTER: TypeAdapter[Any] = TypeAdapter(Rewards)


def test_a_reward_is_named_after_its_kind_with_a_number_if_there_are_several() -> None:
    items = [{"exact": "answer"}, {"format": "a"}, {"format": "b"}, {"format": "c", "name": "mine"}]
    selecting = {"math": "answer", "format": "<answer>(.*)</answer>"}
    assert names(ADAPTER.validate_python([*items, selecting])) == ["exact", "format-1", "format-2", "mine", "math"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least 1 item"),
        ([{}], "exactly one of model, function"),
        ([{"exact": "a", "math": "b"}], "it has math and exact"),
        ([{"url": "https://x", "format": "a"}], "format cannot select what url judges"),
        ([{"format": "("}], "not a regular expression"),
        ([{"function": "rewards.py"}], "a file and a function in it"),
        ([{"code": "tests"}], "needs an image"),
        ([{"exact": "a", "secret": "TOKEN"}], "secret is for url"),
        ([{"exact": "a"}, {"format": "b", "name": "exact"}], "2 rewards have the name exact"),
    ],
)
def test_other_rewards_are_refused(items: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(items)
