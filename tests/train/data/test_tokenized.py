"""Samples as tokens: truncation, EOS, and that they are tokenized once, in a stream."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.row_counts import Kind, Outcome, SourceCounts
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import Data, kind_of
from hpc_rlhf.train.data import arrow, tokenized
from hpc_rlhf.train.data.dialogues import configure_tokenizer, token_ids
from hpc_rlhf.train.data.rows import Sample, transcript
from hpc_rlhf.train.data.sources import StageSample, read, stage_samples
from hpc_rlhf.train.data.templates import prompt_text
from hpc_rlhf.train.data.tokenized import encoded, prepare, prepare_mixture, token_lengths
from hpc_rlhf.train.runtime.world import World
from tests.train import chatty, tiny
from tests.train.data.specs import spec_of

PROMPT, CHOSEN, REJECTED = "\n\nHuman: abcdefgh?\n\nAssistant:", " one two three", " four"
SAMPLE = Sample((("human", "abcdefgh?"),), PROMPT, CHOSEN, REJECTED)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def encode_sample(sample: Sample, tokenizer: Any, spec: JobSpec, stage: str) -> dict[str, Any] | None:
    samples = [StageSample(sample, False, SourceCounts("demo"))]
    return next((stored(row) for _, row, _ in encoded(samples, tokenizer, spec, kind_of(stage).data)), None)


def stored(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is stored without rewards."""
    return {name: value for name, value in row.items() if name != "source"}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_responses_end_with_eos_and_prompts_do_not(tokenizer: Any) -> None:
    spec = spec_of({"demo": 10})
    row = encode_sample(SAMPLE, tokenizer, spec, "reward")
    assert row == {
        "prompt": PROMPT,
        "prompt_ids": ids_of(tokenizer, PROMPT),
        "chosen_ids": [*ids_of(tokenizer, CHOSEN), tokenizer.eos_token_id],
        "rejected_ids": [*ids_of(tokenizer, REJECTED), tokenizer.eos_token_id],
    }
    assert set(encode_sample(SAMPLE, tokenizer, spec, "sft") or ()) == {"prompt", "prompt_ids", "chosen_ids"}
    assert encode_sample(SAMPLE, tokenizer, spec, "ppo") == encode_sample(SAMPLE, tokenizer, spec, "sft")
    assert encode_sample(SAMPLE, tokenizer, spec, "dpo") == row


def test_long_prompts_are_truncated_left_and_long_responses_right_without_eos(tokenizer: Any) -> None:
    spec = spec_of({"demo": 10}, max_prompt_tokens=5, max_answer_tokens=4)
    row = encode_sample(SAMPLE, tokenizer, spec, "sft")
    assert row is not None
    assert row["prompt_ids"] == ids_of(tokenizer, PROMPT)[-5:]
    assert row["chosen_ids"] == ids_of(tokenizer, CHOSEN)[:4]
    assert tokenizer.eos_token_id not in row["chosen_ids"]
    assert encode_sample(SAMPLE, tokenizer, spec, "ppo") is None, "PPO leaves long prompts out"


def test_a_response_that_just_fits_keeps_its_eos(tokenizer: Any) -> None:
    length = len(ids_of(tokenizer, CHOSEN))
    whole = encode_sample(SAMPLE, tokenizer, spec_of({"demo": 10}, max_answer_tokens=length + 1), "sft")
    cut = encode_sample(SAMPLE, tokenizer, spec_of({"demo": 10}, max_answer_tokens=length), "sft")
    assert whole is not None
    assert cut is not None
    assert whole["chosen_ids"][-1] == tokenizer.eos_token_id
    assert cut["chosen_ids"] == whole["chosen_ids"][:-1]


def test_plain_text_starts_with_bos_so_that_its_first_token_is_trained(tokenizer: Any) -> None:
    sample = Sample((), "", "Once upon.")
    row = encode_sample(sample, tokenizer, spec_of({"demo": 10}), "sft")
    assert row is not None
    assert row["prompt_ids"] == [tokenizer.bos_token_id]
    assert row["chosen_ids"] == [*ids_of(tokenizer, "Once upon."), tokenizer.eos_token_id]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("longest", [5, 8, 100])
def test_a_long_text_is_trained_on_in_pieces(bos: bool, longest: int) -> None:
    tokenizer = tiny.tokenizer()
    if not bos:
        tokenizer.bos_token = None
    text = "Once upon a time </s> there was a text that went on."
    counts = SourceCounts("demo")
    spec = spec_of({"demo": 10}, max_prompt_tokens=longest - 2, max_answer_tokens=2)
    samples = [StageSample(Sample((), "", text, where="a, row 1"), False, counts)]
    rows = [row for _, row, _ in encoded(samples, tokenizer, spec, Data.ANSWERS)]
    learned = [token for row in rows for token in row["chosen_ids"]]
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    assert learned == [*ids, tokenizer.eos_token_id]
    assert all(len(row["prompt_ids"]) + len(row["chosen_ids"]) <= longest for row in rows)
    before = [row["prompt_ids"] for row in rows]
    ends = [[], *([row["chosen_ids"][-1]] for row in rows[:-1])]
    assert before == ([[tokenizer.bos_token_id]] * len(rows) if bos else ends)
    assert counts.rows(Kind.USED) == 1
    assert (Outcome.SPLIT in counts.outcomes) == (longest < 100)


@pytest.mark.parametrize("kind", ["plain", "chatml", "headers"])
def test_a_long_dialogue_loses_its_oldest_turns_but_not_the_system_message(kind: str) -> None:
    tokenizer = tiny.tokenizer() if kind == "plain" else configure_tokenizer(chatty.tokenizer(kind), "auto")
    turns = [("system", "Be kind."), ("human", "One?"), ("assistant", "1"), ("human", "Two?"), ("assistant", "2")]
    turns += [("human", "And what comes after those two?")]
    sample = Sample(tuple(turns), transcript(turns), " three")

    def prompt(kept: list[Any]) -> list[int]:
        return token_ids(tokenizer, [prompt_text(tokenizer, kept)])[0]

    def cut(longest: int) -> list[int]:
        counts = SourceCounts("demo")
        spec = spec_of({"demo": 10}, max_prompt_tokens=longest)
        ((_, row, _),) = encoded([StageSample(sample, False, counts)], tokenizer, spec, Data.ANSWERS)
        assert (Outcome.CUT_LEFT in counts.outcomes) == (longest < len(prompt(turns)))
        return list(row["prompt_ids"])

    system = turns[:1]
    assert cut(len(prompt(turns))) == prompt(turns)
    assert cut(len(prompt(turns)) - 1) == prompt([*system, *turns[3:]])
    last = prompt([*system, *turns[5:]])
    assert cut(len(last)) == last
    shorter = cut(len(last) - 4)
    assert len(shorter) == len(last) - 4
    text = tokenizer.decode(shorter)
    assert "Be kind." in text
    assert "after those two?" in text
    assert "And what" not in text
    start = len(prompt([*system, ("human", "")])) - len(prompt([("human", "")])) + 3
    assert shorter[:start] == last[:start], "BOS and the start of the turn are kept"
    assert cut(3)[-2:] == last[-2:]


def test_data_is_tokenized_again_only_if_torn_or_changed(
    tokenizer: Any, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(*args: Any) -> Any:
        made.append("made")
        return stage_samples(*args)

    monkeypatch.setattr(tokenized, "stage_samples", counted)
    for module in (tokenized, arrow):
        monkeypatch.setattr(module, "CHUNK", 8)
    spec = spec_of({"demo": 60}, held_out=0.2)
    first = prepare(spec, "sft", tokenizer, tmp_path, world)
    samples = list(stage_samples(spec, "sft"))
    for rows, held_out in ((first.train, False), (first.held_out, True)):
        own = [sample for sample, held, _ in samples if held == held_out]
        assert list(rows) == [encode_sample(sample, tokenizer, spec, "sft") for sample in own]
        assert own
    again = prepare(spec, "sft", tokenizer, tmp_path, world)
    assert list(again.train) == list(first.train)
    assert len(made) == 1

    (folder,) = tmp_path.iterdir()
    whole = (folder / "train.arrow").read_bytes()
    (folder / "train.arrow").unlink()
    (folder / "train.arrow").write_bytes(whole[:-1])
    assert list(prepare(spec, "sft", tokenizer, tmp_path, world).train) == list(again.train)
    assert len(made) == 2
    prepare(spec_of({"demo": 60}, held_out=0.2, max_prompt_tokens=9), "sft", tokenizer, tmp_path, world)
    assert len(made) == 3


def test_memory_does_not_grow_with_the_rows(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tokenized, arrow):
        monkeypatch.setattr(module, "CHUNK", 32)
    peaks = []
    for count in (20, 200, 1600):  # the first one imports modules
        tracemalloc.start()
        spec = spec_of({"demo": count}, stages=("sft",))
        samples = stage_samples(spec, "sft")
        written = tokenized._write(samples, tokenizer, spec, Data.ANSWERS, tmp_path / str(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert written["rows"]["train"] > 0.8 * count
    assert peaks[2] < 1.5 * peaks[1]


def test_lengths_need_no_reading_of_rows(tokenizer: Any, tmp_path: Path, world: World) -> None:
    data = prepare(spec_of({"demo": 200}), "reward", tokenizer, tmp_path, world)
    lengths = token_lengths(data.train, "prompt_ids", "rejected_ids")
    assert lengths.tolist() == [len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in data.train]


@pytest.mark.parametrize(("stage", "needed"), [("reward", "pairs of responses"), ("ppo", "prompts")])
def test_data_without_anything_for_a_stage_is_one_clear_error(
    tokenizer: Any, tmp_path: Path, world: World, stage: str, needed: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Once upon a time."}\n' * 5)
    spec = spec_of({"path": str(tmp_path / "a.jsonl"), "format": "text"})
    with pytest.raises(HpcRlhfError, match=f"the data has no {needed} for this stage") as caught:
        prepare(spec, stage, tokenizer, tmp_path / "data", world)
    assert caught.value.where == f"stage {stage}"


def test_a_mixture_is_the_whole_source_and_tokenized_once(tokenizer: Any, tmp_path: Path, world: World) -> None:
    spec, source = spec_of({"demo": 10}), SourceSpec.model_validate({"demo": 50, "weight": 2.0})
    rows = prepare_mixture(source, "stages.ppo.ptx", spec, tokenizer, tmp_path, world)
    assert len(rows) == 100
    samples = (StageSample(sample, False, SourceCounts("demo")) for sample in read(source, spec.seed))
    assert list(rows) == [stored(row) for _, row, _ in encoded(samples, tokenizer, spec, Data.ANSWERS, ends=True)]
    (folder,) = tmp_path.iterdir()
    before = (folder / "train.arrow").stat().st_mtime_ns
    prepare_mixture(source, "stages.ppo.ptx", spec, tokenizer, tmp_path, world)
    assert (folder / "train.arrow").stat().st_mtime_ns == before
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    empty = SourceSpec.model_validate({"path": str(tmp_path / "empty.jsonl"), "format": "text"})
    with pytest.raises(HpcRlhfError, match="there is no text in it"):
        prepare_mixture(empty, "stages.ppo.ptx", spec, tokenizer, tmp_path / "data", world)


def test_a_stage_works_without_held_out_samples(tokenizer: Any, tmp_path: Path, world: World) -> None:
    data = prepare(spec_of({"demo": 60}, held_out=0), "ppo", tokenizer, tmp_path, world)
    assert len(data.train) > 5
    assert len(data.held_out) == 0


def test_prompts_that_are_all_too_long_for_ppo_are_one_clear_error(
    tokenizer: Any, tmp_path: Path, world: World
) -> None:
    spec = spec_of({"demo": 60}, max_prompt_tokens=3)
    with pytest.raises(HpcRlhfError, match=r"with a prompt longer than data\.max_prompt_tokens"):
        prepare(spec, "ppo", tokenizer, tmp_path, world)
    assert len(prepare(spec, "sft", tokenizer, tmp_path, world).train) > 5
