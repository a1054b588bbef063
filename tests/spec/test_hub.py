"""Where the hub cache is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.spec import hub

NAMES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "BASE")
THEIRS = (
    "import json; from datasets import config; from huggingface_hub import constants;"
    "print(json.dumps([constants.HF_HOME, constants.HF_HUB_CACHE, str(config.HF_DATASETS_CACHE)]))"
)


@pytest.mark.parametrize(
    "env",
    [
        {"XDG_CACHE_HOME": "/scratch/cache"},
        {"XDG_CACHE_HOME": "/scratch/cache", "HF_HOME": "~/hf"},
        {"HF_HOME": "/a", "HF_HUB_CACHE": "$BASE/b", "HF_DATASETS_CACHE": "/c", "BASE": "/base"},
        {"HUGGINGFACE_HUB_CACHE": "/old"},
    ],
    ids=lambda env: "+".join(env),
)
def test_the_cache_is_where_hugging_faces_libraries_have_it(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", THEIRS], env=os.environ, capture_output=True, check=True)
    ours = (hub.cache(), hub.folder("model"), hub.folder("data set"))
    assert [Path(path) for path in json.loads(done.stdout)] == list(ours)
