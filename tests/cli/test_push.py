"""push: what it uploads to a stand-in of the hub, what it tells before, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.source import SourceSpec
from tests.stand_in_hub import serve
from tests.train.finished import as_if_trained
from tests.train.stages import make_run, tiny_spec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("run")
    spec = tiny_spec(folder / "run", 1, sft={}, reward={}, ppo={"ema": True})
    (folder / "talk").mkdir()
    (folder / "talk/README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Talk\n")
    own = SourceSpec(path=str(folder / "talk"), format="hh")
    sources = (SourceSpec(demo=400), own, SourceSpec(path="acme/pairs", format="hh", weight=0.5))
    made = make_run(spec)
    as_if_trained(made, spec)
    final = spec.model_copy(update={"data": spec.data.model_copy(update={"sources": sources})})
    made.job_yaml.write_text(yaml.safe_dump(final.model_dump(mode="json")))
    return made


def push(run: RunDir, url: str, *args: str, token: str = "hf_stand_in") -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**kept, "HF_ENDPOINT": url, "HF_HOME": str(run.path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = [sys.executable, "-m", "hpc_rlhf.cli", "push", str(run.path), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_a_model_arrives_whole_with_a_card_and_loads(run: RunDir, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with serve(tmp_path) as hub:
        done = push(run, hub.url, "acme/chat")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{hub.url}/acme/chat/commit/")
        assert hub.private == {"acme/chat": True}
        assert push(run, hub.url, "acme/chat", "--stage", "sft", "--public").returncode == 0, "a second commit"
    arrived = tmp_path / "models/acme/chat"
    assert {path.name for path in run.stage("ppo").model.iterdir() if path.is_file()} < {
        path.name for path in arrived.iterdir()
    }
    for path in run.stage("sft").model.iterdir():
        assert (arrived / path.name).read_bytes() == path.read_bytes()
    AutoModelForCausalLM.from_pretrained(arrived)


def test_a_dry_run_prints_the_card_and_uploads_nothing(run: RunDir) -> None:
    done = push(run, "http://127.0.0.1:9", "acme/chat", "--stage", "ema", "--dry-run", token="")
    assert done.returncode == 0, done.stderr
    _, metadata, card = done.stdout.split("---\n", 2)
    facts = yaml.safe_load(metadata)
    assert facts["tags"] == ["hpc-rlhf", "sft", "reward", "ppo"]
    assert facts["datasets"] == ["acme/pairs"]
    assert "| demo | prompt-chosen-rejected | 1 | generated |" in card
    assert "| talk | hh | 1 | cc-by-4.0 |" in card
    assert "| acme/pairs | hh | 0.5 | unknown |" in card
    assert "ema: true" in card
    assert 'model="acme/chat"' in card
    assert str(run.path.parent) not in card, "no local path"
    assert "model.safetensors  " in card


def test_what_cannot_be_uploaded_is_one_error(run: RunDir, tmp_path: Path) -> None:
    with serve(tmp_path) as hub:
        done = push(run, hub.url, "acme/chat", token="hf_other")
        assert (done.returncode, hub.private) == (1, {})
        assert "error: acme/chat: the hub refuses: " in done.stderr
        done = push(run, hub.url, "not a name")
        assert (done.returncode, hub.private) == (2, {})
        assert "error: not a name: is not the name of a repository" in done.stderr
    done = push(run, hub.url, "acme/chat")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert "there is no token of the hub" in push(run, hub.url, "acme/chat", token="").stderr
    weights = run.stage("ppo").model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    damaged = push(run, hub.url, "acme/chat", "--dry-run")
    weights.write_bytes(before)
    assert damaged.returncode == 1
    assert "the model is damaged" in damaged.stderr
    assert all("Traceback" not in each.stderr for each in (done, damaged))
