"""GGUF files: transformers and llama.cpp compute from them what the model computes, or there is no file."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors, trainers
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers as pre

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run import manifest
from hpc_rlhf.train.models.export import export
from tests.train import tiny
from tests.train.stages import make_run, tiny_spec

SIZE = 700
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
TEXTS = ("I've 12345 apples, you'LL see.\n\n\n  And   日本語の text…\t\t\r\nnaïve 한국어 🚀😶\u200d🌫️ ==>x1=y2; don't ",)


def tokenizer(kind: str) -> Any:
    """A tokenizer that splits texts in one of the ways that llama.cpp has a name for."""
    from transformers import PreTrainedTokenizerFast

    bytes_only, with_words = (pre.ByteLevel(add_prefix_space=False, use_regex=regex) for regex in (False, True))

    def by_pattern(digits: str) -> Any:
        return pre.Sequence([pre.Split(Regex(PATTERN % digits), "isolated"), bytes_only])

    splits = {
        "gpt-2": with_words,
        "smollm": pre.Sequence([pre.Digits(individual_digits=True), with_words]),
        "qwen2": by_pattern(r"\p{N}"),
        "llama-bpe": by_pattern(r"\p{N}{1,3}"),
    }
    bpe = Tokenizer(tokenizer_models.BPE(ignore_merges=kind == "llama-bpe"))
    bpe.pre_tokenizer, bpe.decoder = splits[kind], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([*TEXTS * 3, Path(__file__).read_text()], trainer)
    bpe.add_special_tokens([AddedToken("<|im_start|>", normalized=False)])
    bpe.add_tokens([AddedToken("<think>", normalized=False)])
    if kind == "qwen2":
        bpe.normalizer = normalizers.NFC()
    if kind == "llama-bpe":
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(folder: Path, family: str, kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Write a model with random weights, and return its folder."""
    model = tiny.causal(family, 1, **{"vocab_size": SIZE, "max_position_embeddings": 256, **fields})
    export(model.to(dtype), tokenizer(kind), folder, is_main=True)
    return folder


def convert(folder: Path) -> Path:
    from hpc_rlhf.train.models.gguf.file import write_gguf

    file = folder.with_suffix(".gguf")
    write_gguf(folder, file, "a model")
    return file


def expected(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "kind", "dtype", "fields"),
    [
        ("llama", "gpt-2", torch.float32, {}),
        ("llama", "llama-bpe", torch.bfloat16, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("qwen2", "qwen2", torch.float16, {}),
        ("qwen3", "qwen2", torch.float32, {"tie_word_embeddings": True, "head_dim": 128}),
    ],
)
def test_transformers_reads_the_same_model(
    tmp_path: Path, family: str, kind: str, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_model(tmp_path / "model", family, kind, dtype, **fields)
    file = convert(folder)
    model, words = expected(folder)
    ids = words(TEXTS[0], return_tensors="pt")["input_ids"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    read_words = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert read_words(TEXTS[0])["input_ids"] == ids[0].tolist()
    assert read_words.chat_template == words.chat_template


def test_llama_cpp_draws_the_same_tokens(tmp_path: Path) -> None:
    if importlib.util.find_spec("cyllama") is None:
        pytest.skip("no cyllama, which contains llama.cpp")
    cases = [
        ("llama", "gpt-2", {}),
        ("llama", "llama-bpe", {"rope_parameters": LLAMA_3, "head_dim": 16, "tie_word_embeddings": True}),
        ("llama", "smollm", {"rope_parameters": LINEAR}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen2", {"head_dim": 16}),
    ]
    drawing = random.Random(7)
    letters = "abcXYZ 019  '\"\n\t.,;:!?-_()é日本한ñß🚀\u200d\r"
    parts = [*letters, "'s", "'LL", " the", "1234", "<think>", "<|im_start|>"]
    texts = ["".join(drawing.choices(parts, k=drawing.randint(1, 40))) for _ in range(200)]
    asked, wanted = [], []
    for number, (family, kind, fields) in enumerate(cases):
        folder = make_model(tmp_path / f"model{number}", family, kind, **fields)
        model, words = expected(folder)
        prompt = words(TEXTS[0])["input_ids"]
        drawn = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        asked.append([str(convert(folder)), texts, prompt, 16])
        wanted.append(
            {
                "tokens": [words(text)["input_ids"] for text in texts],
                "drawn": drawn[0, len(prompt) :].tolist(),
                "ends": [words.bos_token_id, words.eos_token_id],
                "template": words.chat_template,
            }
        )
    command = [sys.executable, "-m", "tests.train.models.llama_cpp_answers"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for case, answer, right in zip(cases, json.loads(done.stdout.splitlines()[-1]), wanted, strict=True):
        assert answer == right, case


@pytest.mark.parametrize(
    ("family", "fields", "why"),
    [
        ("opt", {}, "its family is opt, not one of llama, qwen2, qwen3"),
        ("llama", {"attention_bias": True}, "its layers have biases"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": YARN}, "its positions are scaled by yarn"),
        ("qwen2", {"rope_parameters": LLAMA_3}, "its positions are scaled by llama3"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding windows"),
        ("llama", {"vocab_size": 500}, "its tokenizer has 602 tokens, but the model 500"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(
    tmp_path: Path, family: str, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(HpcRlhfError, match=why):
        convert(make_model(tmp_path / "model", family, "gpt-2", **fields))


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "splits texts in a way that is not known"),
        ("pre_tokenizer.add_prefix_space", True, "splits texts in a way that is not known"),
        ("normalizer", {"type": "Lowercase"}, "normalizes texts"),
        ("model.ignore_merges", True, "applies merges in a way"),
        ("model.byte_fallback", True, "BPE options"),
        ("added_tokens.0.lstrip", True, "takes spaces around it"),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "not byte-level BPE but WordLevel"),
    ],
)
def test_tokenizers_that_split_otherwise_are_refused(tmp_path: Path, path: str, value: object, why: str) -> None:
    folder = make_model(tmp_path / "model", "llama", "gpt-2")
    spec = json.loads((folder / "tokenizer.json").read_text())
    *parents, last = path.split(".")
    place = spec
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(HpcRlhfError, match=why):
        convert(folder)


def test_adapters_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "model", "llama", "gpt-2")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(HpcRlhfError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        convert(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(HpcRlhfError, match="adapter"):
        convert(folder)


@pytest.mark.slow
def test_the_command_writes_a_finished_model_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = make_run(tiny_spec(tmp_path / "run", 1, sft={}))
    folder = make_model(run.stage("sft").model, "llama", "gpt-2")
    manifest.write(folder, {"stage": "sft"})
    command = [sys.executable, "-m", "hpc_rlhf.cli", "export", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "test-sft.gguf\n"), done.stderr
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="test-sft.gguf")
    model, _ = expected(folder)
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (again.returncode, "the file already exists" in again.stderr) == (2, True)
    assert [path.name for path in tmp_path.glob("*.gguf*")] == ["test-sft.gguf"]
