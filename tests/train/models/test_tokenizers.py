"""Trained tokenizers are deterministic and round-trip text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import FromScratch
from hpc_rlhf.train.data.demo import dialogues
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.models.tokenizers import check_same_tokenizer, load_tokenizer, train_bpe
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny

TEXTS = [" ".join(row.values()) for row in dialogues(300, 1)]
STRANGE = ["\n\nHuman: Was ist 3+4?\r\n\tSieben — 七 \U0001f600 e\u0301 é", "  two  spaces ", "x" * 50, "\x00\x1f"]
REF = FromScratch(from_scratch={"model_type": "llama", "vocab_size": 400})
TRAIN = """
import hashlib
from hpc_rlhf.train.data.demo import dialogues
from hpc_rlhf.train.models.tokenizers import train_bpe
tokenizer = train_bpe((" ".join(row.values()) for row in dialogues(300, 1)), 500).backend_tokenizer.to_str()
print(hashlib.sha256(tokenizer.encode()).hexdigest())
"""


@pytest.mark.slow
def test_training_a_tokenizer_is_deterministic() -> None:
    trained = [
        subprocess.run(
            [sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert trained[0] == trained[1]
    assert len(trained[0].split()[-1]) == 64


def test_any_text_round_trips() -> None:
    tokenizer = train_bpe(iter(TEXTS), 500)
    assert len(tokenizer) == 500
    for text in TEXTS[:20] + STRANGE:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2, "it learned words, not only bytes"


def test_padding_bos_and_eos_are_separate_tokens() -> None:
    tokenizer = train_bpe(iter(TEXTS), 400)
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3
    assert not ids & set(tokenizer(" ".join(TEXTS))["input_ids"])


def test_a_tokenizer_is_trained_once_and_again_after_an_interruption(tmp_path: Path, world: World) -> None:
    asked: list[int] = []

    def texts() -> Any:
        asked.append(1)
        yield from TEXTS

    first = load_tokenizer(REF, texts(), tmp_path / "tokenizer", world)
    again = load_tokenizer(REF, texts(), tmp_path / "tokenizer", world)
    assert first.get_vocab() == again.get_vocab()
    assert len(asked) == 1
    # What a job leaves that ends in the middle of writing.
    (tmp_path / "tokenizer" / "manifest.json").unlink()
    whole = (tmp_path / "tokenizer" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(whole[:100])
    second = load_tokenizer(REF, texts(), tmp_path / "tokenizer", world)
    assert second.get_vocab() == first.get_vocab()
    assert len(asked) == 2


def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path: Path, world: World) -> None:
    with pytest.raises(HpcRlhfError, match="no tokenizer could be loaded") as caught:
        load_tokenizer(str(tmp_path), iter(()), tmp_path / "made", world)
    assert str(tmp_path) in str(caught.value.where)


def test_a_tokenizer_needs_eos_and_may_pad_with_it(tmp_path: Path, world: World) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = train_bpe(iter(TEXTS), 400).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "none")
    with pytest.raises(HpcRlhfError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "none"), iter(()), tmp_path, world)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "eos")
    loaded = load_tokenizer(str(tmp_path / "eos"), iter(()), tmp_path, world)
    assert loaded.pad_token_id == loaded.eos_token_id


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_models_folder_keeps_its_tokenizer(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_bpe(iter(TEXTS), 400)
    run = RunDir(tmp_path)
    export(tiny.causal(kind), tokenizer, run.stage("sft").model, is_main=True)
    loaded = AutoTokenizer.from_pretrained(run.stage("sft").model)
    # transformers loads a Qwen2 folder with that family's own class, whatever the folder says: it composes
    # accents and splits numbers, and is otherwise the same.
    for text in TEXTS if kind == "qwen2" else TEXTS + STRANGE:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_reward_model_with_another_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def saved(name: str, tokenizer: Any) -> str:
        export(tiny.causal(kind), tokenizer, tmp_path / name, is_main=True)
        return str(tmp_path / name)

    def changed(**fields: Any) -> Any:
        tokenizer = train_bpe(iter(TEXTS), 400)
        for field, value in fields.items():
            setattr(tokenizer, field, value)
        return tokenizer

    actor, same = saved("actor", changed()), saved("same", changed())
    other, bare = saved("other", train_bpe(iter(TEXTS[:5]), 400)), saved("bare", changed())
    padded = saved("padded", changed(pad_token="[PAD]"))
    template = saved("template", changed(chat_template="{{ messages }}"))
    (tmp_path / "bare/tokenizer.json").unlink()
    loaded = AutoTokenizer.from_pretrained(actor)
    for source in (actor, None):  # read from files, or as transformers loads it
        for good in (same, padded, template):
            check_same_tokenizer(loaded, source, good)
        with pytest.raises(HpcRlhfError, match="its tokenizer differs from the actor's: ") as caught:
            check_same_tokenizer(loaded, source, other)
        assert (caught.value.where, caught.value.exit_code) == (other, INPUT_WRONG)
        with pytest.raises(HpcRlhfError, match=r"its tokenizer differs|it has no tokenizer that could be compared"):
            check_same_tokenizer(loaded, source, bare)
