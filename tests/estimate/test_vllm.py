"""Memory and time of rollouts by vLLM, by closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.model_time import MFU
from hpc_rlhf.estimate.parameters import architecture
from hpc_rlhf.estimate.stage_memory import stage_memory
from hpc_rlhf.estimate.stage_time import stage_time
from hpc_rlhf.spec.job import JobSpec, ModelsSpec
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.spec.stages import EvalSpec
from tests.launch.specs import make_spec
from tests.spec.texts import JOBS

BODY = architecture(ModelsSpec(actor="facebook/opt-13b"), "actor")
WEIGHTS = 2 * BODY.parameters
GIB = 79.1 * 2**30
FLOPS, BANDWIDTH = 312e12 * MFU, 2039e9 * 0.7
PROMPT = ANSWER = 256
# Operations per token of a prompt: those of the weights, and of causal attention, to half of the prompt on average.
PASSED = 2 * BODY.parameters + 4 * BODY.layers * BODY.hidden * PROMPT / 2


def job(micro_batch: int = 16, slurm: dict[str, Any] | None = None, **rollout: Any) -> JobSpec:
    """PPO of OPT-13B on the eight A100s of a node."""
    ppo = {"micro_batch": micro_batch, "zero": 3, "rollout": {"engine": "vllm", **rollout}, "slurm": slurm or {}}
    spec = make_spec("/scratch/demo", {"gpu": "a100-80g", "gpus_per_node": 8}, reward={}, ppo=ppo)
    return spec.model_copy(update={"models": spec.models.model_copy(update={"actor": "facebook/opt-13b"})})


def test_a_token_costs_reading_a_gpus_share_of_the_weights_and_the_cache_two_reductions_a_layer_and_scheduling() -> (
    None
):
    rows = 16 * 4  # of the four ranks whose GPUs the server has
    read = (WEIGHTS + rows * 2 * BODY.kv * (PROMPT + ANSWER / 2)) / 4 / BANDWIDTH
    token = read + 2 * BODY.layers * 15e-6 + 3e-3
    prefill = PASSED * rows * PROMPT / 4 / FLOPS
    parts = stage_time(job(tensor_parallel=4), "ppo").parts
    assert parts["decoding"] == pytest.approx(ANSWER * token + prefill)
    assert parts["new weights"] == pytest.approx(WEIGHTS * 7 / 8 / 300e9 + WEIGHTS / 25e9 + WEIGHTS / 4 / 25e9)


@pytest.mark.parametrize("limits", [{"max_num_seqs": 4}, {"gpu_memory": 0.36}])
def test_responses_that_do_not_fit_at_once_wait(limits: dict[str, Any]) -> None:
    share = limits.get("gpu_memory", 0.3) - 0.03
    fitting = int((share * GIB - WEIGHTS) / (2 * BODY.kv * (PROMPT + ANSWER)))
    rows = limits.get("max_num_seqs", fitting)
    assert 1 < rows < 16
    read = (WEIGHTS + rows * 2 * BODY.kv * (PROMPT + ANSWER / 2)) / BANDWIDTH
    prefill = PASSED * 16 * PROMPT / FLOPS
    spec = job(**{"gpu_memory": 0.6, **limits})
    assert stage_time(spec, "ppo").parts["decoding"] == pytest.approx(16 / rows * ANSWER * (read + 3e-3) + prefill)


def test_a_server_keeps_its_weights_and_cache_while_the_stage_trains() -> None:
    memory = stage_memory(job(tensor_parallel=2), "ppo")
    assert memory.always["vLLM's weights"] == WEIGHTS // 2
    assert memory.always["vLLM's KV cache"] == pytest.approx(0.27 * GIB - WEIGHTS / 2, abs=1)
    assert memory.phases["rollouts"] == {"gathered weights": 2 * BODY.largest}


def separate(**rollout: Any) -> JobSpec:
    """The same with a server on two of the GPUs."""
    placement = {"separate": {"gpus_per_node": 2}}
    return job(16, {"ranks_per_node": 6}, tensor_parallel=2, placement=placement, **rollout)


def test_a_server_on_gpus_of_its_own_generates_all_responses_and_takes_no_memory_of_those_that_train() -> None:
    rows = 16 * 6
    read = (WEIGHTS + rows * 2 * BODY.kv * (PROMPT + ANSWER / 2)) / 2 / BANDWIDTH
    token = read + 2 * BODY.layers * 15e-6 + 3e-3
    prefill = PASSED * rows * PROMPT / 2 / FLOPS
    time = stage_time(separate(), "ppo")
    assert time.parts["decoding"] == pytest.approx(ANSWER * token + prefill)
    assert time.gpus == 8
    assert "vLLM's weights" not in stage_memory(separate(), "ppo").always


def test_weights_cross_the_network_to_a_node_of_vllms_own() -> None:
    time = stage_time(job(tensor_parallel=4, placement={"separate": {"nodes": 1}}), "ppo")
    assert time.parts["new weights"] == pytest.approx(
        WEIGHTS * 7 / 8 / 300e9 + WEIGHTS / 25e9 + WEIGHTS / 2.5e9 + WEIGHTS / 4 / 25e9
    )
    assert time.gpus == 16
    twice = stage_time(job(tensor_parallel=4, placement={"separate": {"nodes": 2}}), "ppo").parts
    assert twice["decoding"] < time.parts["decoding"]


@pytest.mark.parametrize("answers", [16, 2048])
def test_what_overlaps_with_training_takes_no_time(answers: int) -> None:
    def parts(**rollout: Any) -> dict[str, float]:
        spec = separate(**rollout)
        data = spec.data.model_copy(update={"max_answer_tokens": answers})
        return stage_time(spec.model_copy(update={"data": data}), "ppo").parts

    on_policy, ahead = parts(), parts(overlap=1)
    learning = sum(on_policy[part] for part in ("training", "optimizer", "messages"))
    assert (on_policy["decoding"] < learning) == (answers == 16)
    assert ahead == on_policy | {"overlap": -min(learning, on_policy["decoding"])}
    assert "overlap" not in stage_time(job(overlap=1, gpu_memory=0.6), "ppo").parts, "it would compete with training"


def test_a_share_too_small_for_the_weights_is_refused() -> None:
    spec = job(gpu_memory=0.3)
    for estimate in (stage_memory, stage_time):
        with pytest.raises(HpcRlhfError, match=r"gives vLLM 23\.7 GiB on each GPU, but .* need 26\.7 GiB") as caught:
            estimate(spec, "ppo")
        assert caught.value.where == "stages.ppo.rollout.gpu_memory"


def test_an_evaluation_gives_the_servers_each_model_once() -> None:
    training = job(tensor_parallel=2)
    slurm = training.stages.ppo.slurm
    evaluation = EvalSpec.model_validate({"rollout": {"engine": "vllm", "tensor_parallel": 2}, "slurm": slurm})
    spec = training.model_copy(update={"stages": training.stages.model_copy(update={"eval": evaluation})})
    models = len(spec.policies) + 1  # and the one before training
    assert stage_time(spec, "eval").parts["new weights"] == pytest.approx(models * WEIGHTS * (1 + 1 / 2) / 25e9)
    assert stage_memory(spec, "eval").always["vLLM's weights"] == WEIGHTS // 2


def test_hours_in_the_docs_are_those_of_the_shipped_jobs() -> None:
    page = (JOBS.parent / "docs/rollouts.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "| `jobs/" in line]
    assert len(rows) == 5
    for job, settings, in_process, by_vllm in rows:
        spec = load_spec(JOBS.parent / job.split("`")[1], ["slurm.gpu=a100-80g"])
        fields: dict[str, Any] = {}
        for setting in settings.split("`")[1::2]:
            fields |= yaml.safe_load(setting)
        rollout = {name: fields.pop(name) for name in list(fields) if name in RolloutSpec.model_fields}
        for engine, hours in (("in_process", in_process), ("vllm", by_vllm)):
            chosen = spec.stages.ppo.rollout.model_copy(update={"engine": engine, **rollout})
            time = stage_time(spec.with_stages(ppo={**fields, "rollout": chosen}), "ppo")
            assert f"{time.per_thousand * 264 / 3600:.1f}" == hours, (job, settings, engine)
            assert stage_memory(spec.with_stages(ppo={**fields, "rollout": chosen}), "ppo").fits
