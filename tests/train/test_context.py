"""What an attempt checks before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError
from hpc_rlhf.train.context import StageContext
from hpc_rlhf.train.runtime.stop_signals import StopFlag
from hpc_rlhf.train.runtime.world import World
from tests.train.stages import make_run, tiny_spec


def test_a_deepspeed_config_with_other_batch_sizes_than_the_spec_is_refused(tmp_path: Path, world: World) -> None:
    """A user's own template may render anything; the plan goes by the spec."""
    spec = tiny_spec(tmp_path / "run", 1, sft={})
    run = make_run(spec)
    context = StageContext(spec, "sft", run, world, StopFlag(), "first")
    assert (context.batch.micro, context.batch.accumulation, context.batch.global_) == (4, 4, 16)
    config = run.ds_config("sft", "")
    config.write_text(json.dumps({**json.loads(config.read_text()), "gradient_accumulation_steps": 2}))
    with pytest.raises(HpcRlhfError, match="gradient_accumulation_steps is 2, and must be 4") as caught:
        StageContext(spec, "sft", run, world, StopFlag(), "second")
    assert (caught.value.exit_code, caught.value.where) == (INPUT_WRONG, str(config))


def test_where_a_model_loads_from(tmp_path: Path, world: World) -> None:
    spec = tiny_spec(tmp_path / "run", 1, sft={})
    run = make_run(spec)
    context = StageContext(spec, "sft", run, world, StopFlag(), "first")
    assert context.start_model("facebook/opt-350m") == "facebook/opt-350m"
    folder = run.stage("sft").path / "initial"
    assert context.start_model(spec.models.actor) == str(folder)
    assert (folder / "config.json").exists()
