"""Prefetch from a fake hub on this machine: what is downloaded, and that it suffices without a network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from hpc_rlhf.launch.prefetch import wanted
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.load import load_spec
from tests.stand_in_hub import Hub, serve

pytestmark = pytest.mark.slow

JOB = """
name: hubbed
run_dir: {run}
data: {{sources: [{{path: acme/talk, format: prompt-chosen-rejected}}]}}
models: {{actor: acme/tiny}}
stages: {{sft: {{}}}}
"""
WIDTH, TOKENS = 8, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    **{"model_type": "llama", "vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": WIDTH},
    **{"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
}
LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    model, data = root / "models/acme/tiny", root / "datasets/acme/talk/data"
    (model / "onnx").mkdir(parents=True)
    data.mkdir(parents=True)
    square, line = numpy.ones((WIDTH, WIDTH), "float32"), numpy.ones(WIDTH, "float32")
    table = numpy.ones((TOKENS, WIDTH), "float32")
    tensors = {f"model.layers.0.{name}.weight": square for name in LAYER}
    tensors |= {f"model.layers.0.{name}_layernorm.weight": line for name in ("input", "post_attention")}
    save_file(
        {**tensors, "model.embed_tokens.weight": table, "model.norm.weight": line, "lm_head.weight": table},
        model / "model.safetensors",
        {"format": "pt"},
    )
    (model / "config.json").write_text(json.dumps(CONFIG))
    words = {f"w{number}": number for number in range(TOKENS)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(model / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (model / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (model / "onnx/model.onnx").write_bytes(b"and for others")
    rows = [{"prompt": f"question {n}", "chosen": f"answer {n}", "rejected": "no"} for n in range(5)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(root) as hub:
        yield hub


def environment(home: Path, url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"}


@pytest.mark.parametrize("kind", ["refused", "no name", "silent", "silent proxy", "silent SOCKS proxy"])
def test_without_a_network_prefetch_says_so_soon(kind: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(run=tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as busy:
        address = busy.getsockname()
        full = [socket.socket() for _ in range(4)]  # nobody accepts them; the next connection gets no answer
        for one in full:
            one.setblocking(False)
            one.connect_ex(address)
        url = {"refused": "http://127.0.0.1:9", "no name": "https://no-such-host.invalid"}
        env = environment(tmp_path / "home", url.get(kind, f"http://127.0.0.1:{address[1]}"))
        if kind == "silent proxy":
            env |= {"HF_ENDPOINT": "https://huggingface.co", "https_proxy": f"127.0.0.1:{address[1]}", "no_proxy": ""}
        elif kind == "silent SOCKS proxy":
            proxy = {"all_proxy": f"socks5://127.0.0.1:{address[1]}", "https_proxy": "", "no_proxy": ""}
            env |= {"HF_ENDPOINT": "https://huggingface.co", "HF_HUB_ETAG_TIMEOUT": "1", **proxy}
        command = [sys.executable, "-m", "hpc_rlhf.cli", "prefetch", str(job)]
        began = time.monotonic()
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        took = time.monotonic() - began
        for one in full:
            one.close()
    assert done.returncode == 1
    assert "the hub cannot be reached for " in done.stderr
    patience = 1 if "SOCKS" in kind else 2
    assert (f"127.0.0.1 does not answer within {patience} s" in done.stderr) == kind.startswith("silent")
    assert took < 15  # 3 s on a machine with nothing else to do


def prefetch(job: Path, home: Path, url: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_rlhf.cli", "prefetch", str(job), *words]
    return subprocess.run(command, env=environment(home, url), capture_output=True, text=True)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(run=tmp_path / "run"))
    return path


LOAD = """
import sys
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.load import load_spec
spec = load_spec(sys.argv[1])
print("offline:", hub.go_offline(spec))
from transformers import AutoModelForCausalLM, AutoTokenizer
from hpc_rlhf.train.data import sources
model = AutoModelForCausalLM.from_pretrained("acme/tiny")
print("weights:", sum(weight.numel() for weight in model.parameters()), len(AutoTokenizer.from_pretrained("acme/tiny")))
print("rows:", len(list(sources.read(spec.data.sources[0], 1))))
"""


@pytest.mark.train
def test_prefetched_files_suffice_without_a_network(job: Path, tmp_path: Path, served: Hub) -> None:
    home = tmp_path / "home"
    done = prefetch(job, home, served.url)
    assert done.returncode == 0, done.stderr
    model, data = done.stdout.splitlines()
    assert model.startswith("model acme/tiny: 4 files, ")
    assert data.startswith("data set acme/talk train: 2 files, ")
    got = {path.name for path in (home / "hub/models--acme--tiny/snapshots").rglob("*")}
    assert {"model.safetensors", "config.json", "tokenizer.json"} < got
    assert not got & {"pytorch_model.bin", "model.onnx"}
    assert len(list(home.rglob("shapes/*.json"))) == 1  # so that `plan` need not build the model

    asked = len(served.asked)
    again = prefetch(job, home, served.url)
    assert [line.endswith(", already in the cache") for line in again.stdout.splitlines()] == [True, True]
    assert not [path for path in served.asked[asked:] if path.endswith((".safetensors", ".jsonl"))]

    asked = len(served.asked)
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(job)],
        env=environment(home, served.url), capture_output=True, text=True,
    )  # fmt: skip
    assert loaded.stdout.splitlines() == ["offline: True", "weights: 728 16", "rows: 5"], loaded.stderr
    assert served.asked[asked:] == [], "something that should be offline contacted the hub"


def test_a_partial_model_is_not_used_offline_and_is_completed(
    job: Path, tmp_path: Path, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    spec = load_spec(job, ["data.sources=[{demo: 100}]"])
    monkeypatch.setenv("HF_HOME", str(home))
    for name in ("HF_HUB_CACHE", hub.OFFLINE):
        monkeypatch.delenv(name, raising=False)
    assert not hub.go_offline(spec)
    assert prefetch(job, home, served.url, "--set", "data.sources=[{demo: 100}]").returncode == 0
    (item,) = hub.items(spec)
    assert hub.missing(item) is None
    weights = next((home / "hub").rglob("model.safetensors"))
    weights.resolve().unlink()
    assert "is incomplete" in str(hub.missing(item))
    assert not hub.go_offline(spec)
    assert prefetch(job, home, served.url, "--set", "data.sources=[{demo: 100}]").returncode == 0
    assert weights.resolve().stat().st_size > 0
    monkeypatch.setenv(hub.OFFLINE, "0")
    assert not hub.go_offline(spec), "the user's setting must stay"
    monkeypatch.delenv(hub.OFFLINE)
    assert hub.go_offline(spec)
    assert os.environ[hub.OFFLINE] == "1"
    # Without the hub, complete files in the cache suffice.
    away = prefetch(job, home, "http://127.0.0.1:9", "--set", "data.sources=[{demo: 100}]")
    assert (away.returncode, "already in the cache" in away.stdout) == (0, True)


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("gated", 2, ["models.actor: acme/tiny is gated", "hf auth login"]),
        ("absent", 2, ["models.actor: the hub has no model acme/none", "check the id"]),
        ("away", 1, ["models.actor: the hub cannot be reached for model acme/tiny", "machine with network access"]),
    ],
)
def test_errors_of_the_hub_are_one_sentence(
    job: Path, tmp_path: Path, served: Hub, what: str, code: int, words: list[str]
) -> None:
    sets = ["--set", "models.actor=acme/none"] if what == "absent" else []
    served.gated = {"acme/tiny"} if what == "gated" else set()
    try:
        url = "http://127.0.0.1:9" if what == "away" else served.url
        done = prefetch(job, tmp_path / "home", url, *sets)
    finally:
        served.gated = set()
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"], {"consolidated.safetensors", "pytorch_model.bin"}),  # noqa: E501
        (["model-00001-of-2.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin"],  # noqa: E501
         {"pytorch_model.bin.index.json", "pytorch_model.bin"}),
        (["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "onnx/model.onnx"],
         {"flax_model.msgpack", "tf_model.h5", "onnx/model.onnx"}),
        (["model.safetensors", "original/params.json", "tokenizer.model", "chat_template.jinja"], {"original/params.json"}),  # noqa: E501
    ],
)  # fmt: skip
def test_only_files_that_loading_needs_are_fetched(names: list[str], left_out: set[str]) -> None:
    every = ["config.json", "vocab.json", "merges.txt", *names]
    assert set(wanted(every)) == set(every) - left_out
