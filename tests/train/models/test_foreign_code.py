"""Code that comes with a model is not executed, and nobody is asked whether it should be."""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hpc_rlhf.train
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.models.loading import has_score_head, load_causal
from hpc_rlhf.train.models.tokenizers import load_tokenizer

CODE = """
open({left!r}, "w")
from transformers import PretrainedConfig
class Theirs(PretrainedConfig):
    model_type = "theirs"
"""
AUTO = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "theirs.Theirs")
LOADERS: list[Callable[[str], Any]] = [
    lambda path: load_causal(path, torch.float32),
    lambda path: load_tokenizer(path, iter(()), Path(path), None),  # type: ignore[arg-type]
    lambda path: has_score_head(path) or load_causal(path, torch.float32),
]


@pytest.mark.parametrize("load", LOADERS)
def test_code_of_a_model_is_refused_without_a_question(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, left = tmp_path / "model", tmp_path / "left"
    model.mkdir()
    for file, auto in (("config.json", AUTO), ("tokenizer_config.json", {"AutoTokenizer": ["theirs.Theirs", None]})):
        (model / file).write_text(json.dumps({"model_type": "theirs", "auto_map": auto}))
    (model / "theirs.py").write_text(CODE.format(left=str(left)))
    questions: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *words: questions.append(words) or "y")
    with pytest.raises(HpcRlhfError):
        load(str(model))
    assert not questions
    assert not left.exists()


def test_every_loader_of_transformers_is_called_without_foreign_code() -> None:
    for file in Path(hpc_rlhf.train.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
                assert isinstance(node, ast.Call)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{file}:{node.lineno}"
