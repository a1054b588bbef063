"""An engine's state resumes bit for bit on as many ranks, and as the same training on any other number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train import tiny
from tests.train.ranks import reports

pytestmark = pytest.mark.train
# ZeRO stage, precision, optimizer in CPU memory.
WAYS = ["0 fp32 no", "0 bf16 no", "0 fp16 no", "1 fp32 no", "2 fp16 no", "2 bf16 yes", "3 fp32 no", "3 bf16 yes"]
# With tensor parallelism; the last with adapters beside all weights.
SPLIT_WAYS = ["0 fp32 no", "1 fp32 no", "2 bf16 yes", "1 fp32 lora"]

RANK = """
import json, sys
from pathlib import Path
import torch
from hpc_rlhf.spec.stages import SftSpec
from hpc_rlhf.train.models import lora
from hpc_rlhf.train.runtime import world as worlds
from hpc_rlhf.train.models import engine as engines
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.loading import DTYPES, load_causal, sharded_loading
from hpc_rlhf.train.models.vocabulary import split_model
from hpc_rlhf.train.ragged import Ragged
from hpc_rlhf.train.checkpoint.snapshot import Snapshot

source, folder, ways = sys.argv[1], Path(sys.argv[2]), sys.argv[5:]
tensor = int(sys.argv[4])
world = worlds.join(int(sys.argv[3])).laid_out(tensor)
batch = Ragged.of([[5, 6, 7, 8, 9, 10, 3], [11, 12, 13, 4]])

def new_engine(zero, precision, offload):
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": zero},
    }
    if zero == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    if tensor > 1:
        config["tensor_parallel"] = {"autotp_size": tensor}
    if offload == "yes":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision == "fp16":  # its first steps are skipped
        config["fp16"] = {"enabled": True, "initial_scale_power": 17, "loss_scale_window": 100}
    spec = SftSpec.model_validate({"zero": zero, "precision": precision, "warmup": 2})
    with sharded_loading(config):
        model = load_causal(source, DTYPES[precision], 0.0)
    split_model(model, tensor)
    if offload == "lora":
        lora.adapt(model, lora.LoraSpec(rank=4, only=False), 5)
    return engines.training_engine(LanguageModel(model), config, spec, 1e-3, 50)

def train(engine, steps):
    losses = []
    def loss():
        log_probs, _ = engine(batch.ids, batch.lengths, batch.tail([6, 3]))
        losses.append(float(-log_probs.mean()))
        return -log_probs.mean()
    for _ in range(steps):
        engines.optimizer_step(engine, [loss])
    return losses

def end(engine):
    sums = {p.key: p.tensor.double().sum().item() for p in engines.pieces(engine, world) if p.mine}
    return sums, engines.facts(engine, world)

seen = {}
for way in ways:
    zero, precision, offload = way.split()
    engine = new_engine(int(zero), precision, offload)
    kept = folder / way.replace(" ", "-")
    if not kept.exists():
        train(engine, 5)
        world.barrier()
        snapshot = Snapshot(kept)
        engines.save(engine, snapshot, "engine", world)
        snapshot.write()
    else:
        engines.load(engine, kept / "engine", world)
    world.barrier()
    losses = train(engine, 4)
    shares = world.gather(end(engine)[0])
    keys = sorted({key for share in shares for key in share})
    sums = {key: sum(share.get(key, 0.0) for share in shares) for key in keys}
    seen[way] = {"losses": losses, "sums": sums, "facts": end(engine)[1]}
print(json.dumps(seen))
worlds.leave()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What two ranks (2) did without a break, and what two (20), one and three did from their checkpoints."""
    folder = tmp_path_factory.mktemp("state")
    tiny.causal("llama").save_pretrained(folder / "model")
    ways = list(filter(tiny.is_supported, WAYS))
    folders = [str(folder / "model"), str(folder / "kept")]
    return {
        key: reports(RANK, [*folders, str(count), "1", *ways], count)[0]
        for key, count in ((2, 2), (20, 2), (1, 1), (3, 3))
    }


@pytest.mark.parametrize("way", WAYS)
def test_the_same_number_of_ranks_resumes_bit_for_bit(runs: dict[int, dict[str, Any]], way: str) -> None:
    tiny.skip_unless_supported(way)
    assert runs[20][way] == runs[2][way]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_ranks_resumes_the_same_training(
    runs: dict[int, dict[str, Any]], way: str, count: int
) -> None:
    tiny.skip_unless_supported(way)
    uninterrupted, resumed = runs[2][way], runs[count][way]
    tolerance = 1e-5 if "fp32" in way else 5e-3
    assert resumed["losses"] == pytest.approx(uninterrupted["losses"], rel=tolerance)
    assert resumed["sums"].keys() == uninterrupted["sums"].keys()
    for name in ("optimizer", "schedule", "scale"):
        assert resumed["facts"][name] == uninterrupted["facts"][name]


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [("llama", [(1, 1), (2, 2)]), ("llama", [(2, 2), (1, 1), (4, 2)]), ("mixtral", [(2, 2), (1, 1), (4, 2)])],
    ids=["from one", "from two", "experts from two"],
)
def test_another_number_of_tensor_ranks_resumes_the_same_training(
    tmp_path: Path, kind: str, layouts: list[tuple[int, int]]
) -> None:
    """Each layout has a number of ranks, and of those that share layers; the first one trains without a break."""
    experts = {"num_local_experts": 4} if kind == "mixtral" else {}
    tiny.causal(kind, **experts).save_pretrained(tmp_path / "model")
    # Half precision may send a token to other experts.
    ways = [way for way in SPLIT_WAYS if tiny.is_supported(way) and (kind == "llama" or "fp32" in way)]
    folders = [str(tmp_path / "model"), str(tmp_path / "kept")]
    uninterrupted, *others = (
        reports(RANK, [*folders, str(ranks), str(tensor), *ways], ranks)[0] for ranks, tensor in layouts
    )
    for resumed in others:
        for way in ways:
            tolerance = 1e-5 if "fp32" in way else 5e-3
            assert resumed[way]["losses"] == pytest.approx(uninterrupted[way]["losses"], rel=tolerance), way
            assert resumed[way]["facts"]["optimizer"] == uninterrupted[way]["facts"]["optimizer"]
