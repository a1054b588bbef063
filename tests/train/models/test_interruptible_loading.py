"""Loading and writing a model end early when the attempt must stop."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hpc_rlhf.train.models.export import interruptible
from hpc_rlhf.train.runtime.stop_signals import WorkCancelled
from tests.train import tiny


def test_loading_and_writing_stop_between_two_items(tmp_path: Path) -> None:
    tiny.causal("llama").save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2

    asked = count()
    with pytest.raises(WorkCancelled), interruptible(lambda: next(asked) == 2):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    asked = count()
    with pytest.raises(WorkCancelled), interruptible(lambda: next(asked) == 2):
        model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 2
    assert logging.set_tqdm_hook(None) is None
