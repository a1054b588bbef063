"""DeepSpeed has every private name that ``deepspeed_internals`` uses; a failure names the missing one.

When a test here fails after an update of DeepSpeed, change
``hpc_rlhf/train/parallel/deepspeed_internals.py``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from pathlib import Path

import pytest

import hpc_rlhf.train
from tests.train.ranks import reports

MODULES = {
    "deepspeed.ops": ["__compatible_ops__"],
    "deepspeed.runtime.fp16.unfused_optimizer": ["FP16_UnfusedOptimizer"],
    "deepspeed.runtime.pipe.module": ["PipelineModule"],
    "deepspeed.runtime.pipe.topology": ["ProcessTopology"],
    "deepspeed.utils.groups": [
        "_init_tp_mesh_device", "get_data_parallel_group", "get_tensor_model_parallel_group",
    ],
}  # fmt: skip
METHODS = {
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": ["refresh_fp32_params"],
    "deepspeed.runtime.pipe.engine.PipelineEngine": ["train_batch"],
    "deepspeed.runtime.pipe.module.PipelineModule": ["get_tied_weights_and_groups"],
    "deepspeed.runtime.pipe.topology.PipelineParallelGrid": ["get_pipe_parallel_group"],
    "deepspeed.runtime.engine.DeepSpeedEngine": [
        "get_global_grad_norm", "set_gradient_accumulation_boundary", "was_step_applied",
    ],
}  # fmt: skip
ENGINE = [
    "allreduce_no_retain", "basic_optimizer", "dp_world_size", "enable_backward_allreduce", "lr_scheduler", "mpu",
    "global_steps", "global_samples", "micro_steps", "skipped_steps",
]  # fmt: skip
# By ZeRO stage and precision: attributes of the wrapped optimizer, and of one of its parameters.
OPTIMIZERS: dict[str, tuple[list[str], list[str]]] = {
    "0 fp32": ([], []),
    "0 bf16": (
        [
            "fp16_groups", "fp32_groups", "loss_scale", "loss_scale_config", "optimizer", "overflow",
            "overflow_checker.check", "_global_grad_norm",
        ],
        [],
    ),
    "1 bf16": (
        [
            "single_partition_of_fp32_groups", "update_lp_params", "loss_scaler", "overflow",
            "_global_grad_norm",
        ],
        [
            "_hp_mapping.param_group_index", "_hp_mapping.hp_fragment_address.start",
            "_hp_mapping.hp_fragment_address.numel", "_hp_mapping.lp_fragment_address.start",
        ],
    ),
    "3 bf16": (
        [
            "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "fp16_partitioned_groups",
            "unflatten", "grad_position", "get_param_id", "checkpoint_event_prologue", "checkpoint_event_epilogue",
            "loss_scaler", "overflow", "_global_grad_norm",
        ],
        ["ds_id", "ds_numel", "ds_shape", "ds_tensor"],
    ),
}  # fmt: skip

RANK = """
import json, operator, sys
import torch
from hpc_rlhf.train.runtime.world import join
join(1)
assert "mlflow" not in sys.modules, "DeepSpeed has loaded it"
import mlflow  # whoever wants it, still can
from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.train.models.engine import training_engine
from hpc_rlhf.train.models.loading import DTYPES, load_causal, sharded_loading

def missing(owner, names):
    found = []
    for name in names:
        try:
            operator.attrgetter(name)(owner)
        except AttributeError:
            found.append(name)
    return found

report = {}
for way, (optimizer, parameter) in json.loads(sys.argv[2]).items():
    stage, precision = way.split()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": int(stage)}}
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    with sharded_loading(config):
        model = load_causal(sys.argv[1], DTYPES[precision])
    engine = training_engine(model, config, SftSpec(precision=precision), 1e-3, 10)
    report[way] = {
        "engine": missing(engine, json.loads(sys.argv[3])), "optimizer": missing(engine.optimizer, optimizer),
        "parameter": missing(next(model.parameters()), parameter),
    }
print(json.dumps(report))
"""


@pytest.mark.parametrize(("module", "names"), MODULES.items())
def test_modules_have_their_private_names(module: str, names: list[str]) -> None:
    found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == [], f"{module} lost them"


@pytest.mark.parametrize(("path", "names"), METHODS.items())
def test_classes_have_their_private_methods(path: str, names: list[str]) -> None:
    module, name = path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert [method for method in names if not hasattr(found, method)] == [], f"{path} lost them"


def test_the_check_that_exchanges_pickles_is_the_hook_that_is_removed() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine)
    assert "self.first_dataloader_check = self.module.register_forward_pre_hook(" in source
    assert source.count("dist.broadcast_object_list(") == 2


def test_the_pipeline_engine_counts_micro_batches_and_tied_weights_as_it_is_told() -> None:
    from deepspeed.runtime import utils
    from deepspeed.runtime.pipe.engine import PipelineEngine

    schedule = inspect.getsource(PipelineEngine._train_schedule)
    assert "micro_batches=self.micro_batches" in schedule
    assert "ds_pipe_replicated" in inspect.getsource(utils)


@pytest.mark.train
def test_engines_have_their_private_attributes(tmp_path: Path) -> None:
    from tests.train import tiny

    tiny.causal("llama").save_pretrained(tmp_path)
    (report,) = reports(RANK, [str(tmp_path), json.dumps(OPTIMIZERS), json.dumps(ENGINE)], 1)
    assert report == {way: {"engine": [], "optimizer": [], "parameter": []} for way in OPTIMIZERS}


def test_no_other_file_touches_a_private_name() -> None:
    private = {name for names in MODULES.values() for name in names}
    private |= {name for names in METHODS.values() for name in names}
    private |= {part for lists in OPTIMIZERS.values() for names in lists for name in names for part in name.split(".")}
    private |= set(ENGINE)
    public = {
        "get_global_grad_norm", "set_gradient_accumulation_boundary", "was_step_applied", "lr_scheduler",
        "global_steps", "loss_scale", "optimizer", "numel", "start", "check", "unflatten",
    }  # fmt: skip
    folder = Path(hpc_rlhf.train.__file__).parent
    offenders = [
        f"{path.relative_to(folder)}:{node.lineno} {node.attr}"
        for path in sorted(folder.rglob("*.py"))
        if path.name != "deepspeed_internals.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in private - public
    ]
    assert offenders == []
