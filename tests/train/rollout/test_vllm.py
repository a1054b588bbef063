"""Rollouts by the real vLLM. Each model needs an engine, which takes a minute; `make test` starts the first only."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hpc_rlhf.run import manifest
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.rollout.backend import GenerationRequest, Sampling
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine
from hpc_rlhf.train.runtime.world import World
from tests.cluster import wait_until
from tests.cluster.processes import find
from tests.demos import short_grpo
from tests.train import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm")]

PROMPTS = [[5, 9, 11, 30, 7], [8], [40, 41, 42, 43], [5, 9, 11, 30, 12, 13]]
LONGEST = 10
# vLLM has no attention for smaller heads.
_HEADS: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SIZES: dict[str, dict[str, Any]] = {
    "llama": _HEADS,
    "llama tied": {**_HEADS, "tie_word_embeddings": True},
    "opt": {"hidden_size": 64, "num_attention_heads": 2, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 64, "n_head": 2},
    "qwen2": _HEADS,
    "qwen3": {**_HEADS, "tie_word_embeddings": True},
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "llama" else pytest.mark.vllm) for name in SIZES]
)
def engine(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    model = tiny.causal(request.param.split()[0], **SIZES[request.param])
    folder = tmp_path_factory.mktemp("engine")
    spec = RolloutSpec(engine="vllm", max_num_seqs=3)
    backend = VllmEngine(model, world, spec, folder, 32, "attempt", "stages.grpo.rollout", SlurmSpec())
    backend.sync_weights(model)
    yield backend
    backend.close()


def likeliest(model: Any, prompt: list[int]) -> list[int]:
    """transformers' response."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LONGEST, eos_token_id=tiny.EOS
    )  # fmt: skip
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def test_greedy_tokens_are_those_of_the_engine_in_this_process_and_of_transformers_after_each_update(
    engine: VllmEngine, world: World
) -> None:
    request = GenerationRequest(PROMPTS, LONGEST, tiny.EOS, Sampling(greedy=True))
    seen = []
    for update in range(4):
        if update:
            with torch.no_grad():
                for parameter in engine.model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            engine.sync_weights(engine.model)
        responses = engine.generate(request).responses
        assert responses == RolloutEngine(engine.model, world).generate(request).responses
        assert responses == [likeliest(engine.model, prompt) for prompt in PROMPTS]
        seen.append(responses)
    assert seen[0] != seen[1] != seen[2] != seen[3]


@torch.no_grad()
def test_log_probabilities_of_sampled_tokens_are_those_of_the_model_at_the_temperature(engine: VllmEngine) -> None:
    prompts = [prompt for prompt in PROMPTS for _ in range(8)]
    keys = [("sampled", row) for row in range(len(prompts))]
    rollout = engine.generate(GenerationRequest(prompts, LONGEST, tiny.EOS, Sampling(temperature=0.7), keys))
    assert len({tuple(response) for response in rollout.responses[:8]}) > 1
    assert rollout.response_log_probs is not None
    for prompt, response, log_probs in zip(prompts, rollout.responses, rollout.response_log_probs, strict=True):
        assert len(response) == LONGEST or response[-1] == tiny.EOS
        assert tiny.EOS not in response[:-1]
        logits = engine.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(log_probs), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["llama"], indirect=True, scope="module")
def test_first_and_second_tokens_have_the_models_probabilities(engine: VllmEngine) -> None:
    """By a chi-square test, which a slightly different temperature fails."""
    model, count, prompt = tiny.causal("llama", seed=1, **SIZES["llama"]), 2000, PROMPTS[0]
    engine.sync_weights(model)
    keys = [("pairs", row) for row in range(count)]
    request = GenerationRequest([prompt] * count, 2, tiny.EOS, Sampling(temperature=0.7), keys)
    drawn = torch.zeros(tiny.VOCABULARY, tiny.VOCABULARY, dtype=torch.float64)
    for response in engine.generate(request).responses:
        drawn[response[0], response[-1]] += 1
    assert p_value(drawn, pairs(model, prompt, 0.7)) > 0.01
    assert p_value(drawn, pairs(model, prompt, 0.8)) < 1e-9


def pairs(model: Any, prompt: list[int], temperature: float) -> torch.Tensor:
    """(vocabulary, vocabulary): the probability of each first token with each second one, after EOS only itself."""
    prompts = torch.tensor([[*prompt, token] for token in range(tiny.VOCABULARY)])
    logits = model(input_ids=prompts).logits[:, -2:].double() / temperature
    first, second = logits[0, 0].softmax(-1), logits[:, 1].softmax(-1)
    second[tiny.EOS] = torch.eye(tiny.VOCABULARY)[tiny.EOS]
    return first.unsqueeze(1) * second


def p_value(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's chi-square test. Events that are expected less than five times count as one."""
    expected = probabilities * drawn.sum()
    likely = expected >= 5
    observed, expected = (torch.cat([each[likely], each[~likely].sum().view(1)]) for each in (drawn, expected))
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(len(expected) - 1.0).double() / 2, statistic / 2))


def test_another_model_answers_with_its_own_weights(engine: VllmEngine, world: World) -> None:
    first, request = engine.model, GenerationRequest(PROMPTS, LONGEST, tiny.EOS, Sampling(greedy=True))
    other = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    engine.sync_weights(other)
    responses = engine.generate(request).responses
    assert responses == RolloutEngine(other, world).generate(request).responses
    engine.sync_weights(first)
    assert responses != engine.generate(request).responses


@pytest.mark.vllm
@pytest.mark.parametrize("engine", ["llama"], indirect=True, scope="module")
def test_a_server_with_stale_weights_refuses_and_is_started_again(
    engine: VllmEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    request = GenerationRequest(PROMPTS, LONGEST, tiny.EOS, Sampling(greedy=True))
    responses = engine.generate(request).responses
    engine.syncs += 1  # as if a sync had been lost
    assert engine.generate(request).responses == responses
    assert engine.restarts == 1
    assert "they are stale; it starts again" in capfd.readouterr().err


def three_steps(folder: Path, *settings: str) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """GRPO that rewards variety: each step's metrics, and the facts of its committed rollout."""
    reward = folder / "reward.py"
    reward.write_text("def variety(completions, **_):\n    return [float(len(set(text))) for text in completions]\n")
    rewards = f"rewards=[{{function: '{reward}:variety'}}]"
    run = short_grpo(folder, "rollout.engine=vllm", "max_steps=3", "lr=1e-3", rewards, *settings)
    assert manifest.require(run.stage("grpo").model, "grpo")["step"] == 3
    metrics = [json.loads(line) for line in run.stage("grpo").metrics.read_text().splitlines()]
    assert all(step["grad_norm"] > 0 for step in metrics)
    facts = []
    for file in sorted(run.stage("grpo").rollouts.glob("*-rollout-0.safetensors")):
        with safe_open(str(file), "pt") as opened:
            assert len(opened.get_tensor("lengths")) == 32
            facts.append(opened.metadata())
    assert len(facts) == 3
    return metrics, facts


@pytest.mark.vllm
def test_workers_end_with_their_engine_when_all_that_keeps_them_is_killed(world: World, tmp_path: Path) -> None:
    """Workers may then be in an operation that never ends, and so do not react to anything."""
    model, spec = tiny.causal("llama", **SIZES["llama"]), RolloutSpec(engine="vllm", tensor_parallel=2)
    backend = VllmEngine(model, world, spec, tmp_path, 32, "attempt", "stages.grpo.rollout", SlurmSpec())
    backend.sync_weights(model)
    (keeper,) = find(lambda each: each.session == each.pid and each.parent == os.getpid())
    workers = find(lambda each: each.session == keeper.pid and "VLLM::Worker" in each.command())
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    keeper.kill()
    wait_until(lambda: not find(lambda each: each.session == keeper.pid), 120, "all processes of the server have ended")
    backend.close()


@pytest.mark.vllm
@pytest.mark.train
@pytest.mark.parametrize(
    "settings", [(), ("zero=3", "lora.rank=8", "rollout.tensor_parallel=2")], ids=["two servers", "one of two workers"]
)
def test_grpo_learns_from_the_responses_of_its_own_weights(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Otherwise, the two log-probabilities of a token would differ after the first update."""
    metrics, facts = three_steps(tmp_path, *settings)
    assert all(0 < step["sampler_kl_max"] < 1e-8 for step in metrics)
    assert len({each["weights"] for each in facts}) == 3


@pytest.mark.vllm
@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("rollout.placement={separate: {gpus_per_node: 1}}", "slurm.ranks_per_node=1"),
        ("rollout.placement={separate: {nodes: 1}}",),
    ],
    ids=["colocated", "on the ranks' node", "on its own node"],
)
def test_grpo_learns_one_step_off(tmp_path: Path, settings: tuple[str, ...]) -> None:
    (first, *others), facts = three_steps(tmp_path, "zero=3", "rollout.overlap=1", *settings)
    assert 0 < first["sampler_kl_max"] < 1e-8
    assert all(step["sampler_kl_max"] > 1e-6 for step in others), "an update lies between"
    assert [each["weights_step"] for each in facts] == ["0", "0", "1"]
