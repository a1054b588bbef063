"""Samples as tokens: where they are cut, where EOS stands, how they are padded, and that they are made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.data import tokenized
from hpc_rlhf.train.data.tokenized import encode_sample, pad_left, pad_right, prepare
from hpc_rlhf.train.world import World
from tests.train import tiny
from tests.train.data.specs import spec_of

SAMPLE = {"prompt": "\n\nHuman: abcdefgh?\n\nAssistant:", "chosen": " one two three", "rejected": " four"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_answers_end_with_eos_and_prompts_do_not(tokenizer: Any) -> None:
    spec = spec_of({"demo": 10})
    row = encode_sample(SAMPLE, tokenizer, spec, "reward")
    assert row == {
        "prompt": SAMPLE["prompt"],
        "prompt_ids": ids_of(tokenizer, SAMPLE["prompt"]),
        "chosen_ids": [*ids_of(tokenizer, SAMPLE["chosen"]), tokenizer.eos_token_id],
        "rejected_ids": [*ids_of(tokenizer, SAMPLE["rejected"]), tokenizer.eos_token_id],
    }
    assert set(encode_sample(SAMPLE, tokenizer, spec, "sft") or ()) == {"prompt", "prompt_ids", "chosen_ids"}
    assert set(encode_sample(SAMPLE, tokenizer, spec, "ppo") or ()) == {"prompt", "prompt_ids"}


def test_long_prompts_are_cut_at_the_left_and_long_answers_at_the_right_without_eos(tokenizer: Any) -> None:
    spec = spec_of({"demo": 10}, max_prompt_tokens=5, max_answer_tokens=4)
    row = encode_sample(SAMPLE, tokenizer, spec, "sft")
    assert row is not None
    assert row["prompt_ids"] == ids_of(tokenizer, SAMPLE["prompt"])[-5:]
    assert row["chosen_ids"] == ids_of(tokenizer, SAMPLE["chosen"])[:4]
    assert tokenizer.eos_token_id not in row["chosen_ids"]
    assert encode_sample(SAMPLE, tokenizer, spec, "ppo") is None, "PPO leaves long prompts out"


def test_an_answer_that_just_fits_keeps_its_eos(tokenizer: Any) -> None:
    length = len(ids_of(tokenizer, SAMPLE["chosen"]))
    whole = encode_sample(SAMPLE, tokenizer, spec_of({"demo": 10}, max_answer_tokens=length + 1), "sft")
    cut = encode_sample(SAMPLE, tokenizer, spec_of({"demo": 10}, max_answer_tokens=length), "sft")
    assert whole is not None
    assert cut is not None
    assert whole["chosen_ids"][-1] == tokenizer.eos_token_id
    assert cut["chosen_ids"] == whole["chosen_ids"][:-1]


def test_plain_text_starts_with_bos_so_that_its_first_token_is_learnt(tokenizer: Any) -> None:
    sample = {"prompt": "", "chosen": "Once upon.", "rejected": None}
    row = encode_sample(sample, tokenizer, spec_of({"demo": 10}), "sft")
    assert row is not None
    assert row["prompt_ids"] == [tokenizer.bos_token_id]
    assert row["chosen_ids"] == [*ids_of(tokenizer, "Once upon."), tokenizer.eos_token_id]


def test_an_eos_that_a_tokenizer_puts_behind_every_text_does_not_end_the_prompt(tokenizer: Any) -> None:
    def ending(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ids_of(tokenizer, text) + [tiny.EOS] * add_special_tokens}

    ending.eos_token_id, ending.bos_token_id = tiny.EOS, tiny.BOS  # type: ignore[attr-defined]
    row = encode_sample(SAMPLE, ending, spec_of({"demo": 10}), "sft")
    assert row is not None
    assert row["prompt_ids"] == ids_of(tokenizer, SAMPLE["prompt"])
    assert row["chosen_ids"].count(tiny.EOS) == 1


def test_padding_on_the_right() -> None:
    batch = pad_right([[5, 6], [7]], [[8, 2], [9, 9, 9, 2]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 8, 2, 0], [7, 9, 9, 9, 2]]
    assert batch.mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert batch.answer_mask.tolist() == [[False, False, True, True, False], [False, True, True, True, True]]
    with_eos = pad_right([[5, 6], [7]], [[8, 2], [9, 9, 9, 2]], pad_id=2)
    assert torch.equal(with_eos.mask, batch.mask), "a mask never comes from a token's id"
    assert torch.equal(with_eos.answer_mask, batch.answer_mask)


def test_padding_on_the_left() -> None:
    ids, mask = pad_left([[5, 6, 7], [0], [8, 9]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0], [0, 8, 9]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]


def test_data_is_made_once_and_again_when_it_is_torn_or_another(
    tokenizer: Any, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(*args: Any) -> Any:
        made.append("made")
        return stage_samples(*args)

    stage_samples = tokenized.stage_samples
    monkeypatch.setattr(tokenized, "stage_samples", counted)
    spec = spec_of({"demo": 60}, held_out=0.2)
    first = prepare(spec, "sft", tokenizer, tmp_path, world)
    train, held_out = stage_samples(spec, "sft")
    assert (len(first.train), len(first.held_out)) == (len(train), len(held_out))
    assert first.train[0] == encode_sample(train[0], tokenizer, spec, "sft")
    again = prepare(spec, "sft", tokenizer, tmp_path, world)
    assert list(again.train) == list(first.train)
    assert len(made) == 1

    (folder,) = tmp_path.iterdir()
    (folder / "train" / "dataset_info.json").unlink()
    assert list(prepare(spec, "sft", tokenizer, tmp_path, world).train) == list(first.train)
    assert len(made) == 2
    prepare(spec_of({"demo": 60}, held_out=0.2, max_prompt_tokens=9), "sft", tokenizer, tmp_path, world)
    assert len(made) == 3


def test_a_stage_needs_nothing_held_out(tokenizer: Any, tmp_path: Path, world: World) -> None:
    data = prepare(spec_of({"demo": 60}, held_out=0), "ppo", tokenizer, tmp_path, world)
    assert len(data.train) > 5
    assert len(data.held_out) == 0


def test_prompts_that_are_all_too_long_for_ppo_are_one_clear_error(
    tokenizer: Any, tmp_path: Path, world: World
) -> None:
    spec = spec_of({"demo": 60}, max_prompt_tokens=3)
    with pytest.raises(HpcRlhfError, match=r"every prompt is longer than data\.max_prompt_tokens, 3"):
        prepare(spec, "ppo", tokenizer, tmp_path, world)
    assert len(prepare(spec, "sft", tokenizer, tmp_path, world).train) > 5
