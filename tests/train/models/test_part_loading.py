"""A rank that reads its own shards of a model has what it would have of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.train import tiny
from tests.train.ranks import reports

pytestmark = pytest.mark.train

RANK = """
import json, sys, torch
from pathlib import Path
from hpc_rlhf.train.runtime.world import join
world = join(2).laid_out(2)
from hpc_rlhf.train.models import part_loading
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import load_causal, load_reward, sharded_loading
from hpc_rlhf.train.models.vocabulary import split_model

torch.set_num_threads(1)
ids, lengths = torch.arange(3, 26), (7, 4, 12)
config = {"zero_optimization": {"stage": 0}, "tensor_parallel": {"autotp_size": 2}}
loads, load = [], part_loading.load

def noted(*arguments):
    loads.append(load(*arguments))
    return loads[-1]

part_loading.load = noted

def outputs(model):
    if hasattr(model, "classifier"):
        return model(ids, lengths).detach()
    return LanguageModel(model)(ids, lengths, torch.arange(1, 7))[0].detach()

seen = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for precision in (torch.float32, torch.bfloat16):
        read = (lambda: load_reward(str(folder), precision, 5)) if "reward" in folder.name else (
            lambda: load_causal(str(folder), precision)
        )
        whole = read()
        split_model(whole, 2)
        with sharded_loading(config):
            part = read()
        split_model(part, 2)
        expected, actual = dict(whole.named_parameters()), dict(part.named_parameters())
        inner = getattr(part, "classifier", part)
        seen.setdefault(folder.name, []).append({
            "names": list(expected) == list(actual),
            "weights": all(torch.equal(actual[name], expected[name]) for name in expected),
            "outputs": torch.equal(outputs(part), outputs(whole)),
            "types": {str(each.dtype) for each in part.parameters()} == {str(precision)},
            "eval": not part.training or "reward" in folder.name,
            "eos": getattr(getattr(inner, "generation_config", None), "eos_token_id", None),
            "own": loads[-1] is not None,
            "exact": getattr(getattr(inner, "score", None), "exact", None) is None
            or torch.equal(inner.score.exact, whole.classifier.score.exact),
        })
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as they are published: in one file or several, tied or not, without a prefix, and with other heads."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "opt", "qwen3"):
        tiny.causal(kind).save_pretrained(folder / kind)
        tiny.classifier(kind).save_pretrained(folder / f"{kind} reward")
    tiny.causal("llama").save_pretrained(folder / "llama in files", max_shard_size="30KB")
    tiny.causal("llama", vocab_size=97).save_pretrained(folder / "llama of 97 tokens")
    tiny.causal("opt").save_pretrained(folder / "new opt reward")
    renamed = {
        "opt without prefix": ("opt", "model.", ""),
        "llama reward of v_head": ("llama reward", "score.", "v_head."),
    }
    for name, (kind, old, new) in renamed.items():
        (folder / name).mkdir()
        weights = load_file(folder / kind / "model.safetensors")
        weights = {key.replace(old, new, 1) if key.startswith(old) else key: each for key, each in weights.items()}
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / kind / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "architectures": None}))
    (folder / "opt with a head").mkdir()
    weights = load_file(folder / "opt/model.safetensors")
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"] * 2
    save_file(weights, folder / "opt with a head/model.safetensors", {"format": "pt"})
    (folder / "opt with a head/config.json").write_bytes((folder / "opt/config.json").read_bytes())
    generation = folder / "llama/generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "eos_token_id": [2, 7]}))
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return reports(RANK, [str(folder)], 2)


def test_shards_are_those_of_the_whole_model(seen: list[dict[str, Any]]) -> None:
    """Also where transformers has to rename weights, or does not tie a head that differs, and the whole model is
    loaded."""
    for rank in seen:
        assert len(rank) == 12
        for name, trials in rank.items():
            for trial in trials:
                assert all(trial[key] for key in ("names", "weights", "outputs", "types", "eval", "exact")), name
                assert trial["own"] == (name not in ("llama reward of v_head", "opt with a head")), name
        assert rank["llama"][0]["eos"] == [2, 7]
