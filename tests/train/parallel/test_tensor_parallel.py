"""Layers split over real ranks give the outputs, gradients, weights and rollouts of the whole model."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_rlhf.spec.tensor_checks import ARCHITECTURES
from tests.train.ranks import reports

pytestmark = pytest.mark.train

RANK = """
import json, sys, torch
from hpc_rlhf.train.runtime.world import join
world = join(2).laid_out(2)
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models import packed_attention as packed
from hpc_rlhf.train.models.vocabulary import split_model
from hpc_rlhf.train.parallel.tensor_parallel import gather, split_dim
from hpc_rlhf.train.models.engine import gradient_norm
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.models.lora import adapt, adapters
from hpc_rlhf.train.models.export import full_bytes, full_weights, module_weights
from hpc_rlhf.train.rollout.backend import GenerationRequest, RolloutCancelled, Sampling
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from tests.models.families import FAMILIES
from tests.train import tiny

torch.set_num_threads(1)
lengths = (7, 4, 12)
ids = torch.randint(3, tiny.VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(1))
ids[3] = tiny.PAD  # whose embedding gets no gradient
predicted = torch.tensor([4, 5, 6, 9, 10, 15, 22])
FULLY = (
    "deepseek_v2", "llama", "llama:97", "mistral", "mixtral", "opt", "opt:97", "phi3", "qwen2", "qwen3", "qwen3_moe",
)
OTHERS = {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCABULARY}
prompts, keys = [[11, 12], [5, 6, 7], [9], [8, 7, 6, 5, 4], [3, 4]], [(3, row) for row in range(5)]

def adapted(model, only):
    adapt(model, LoraSpec(rank=4, alpha=6, only=only), 5)
    for number, adapter in enumerate(adapters(model)):
        parts = 2 if split_dim(adapter.lora_b) == 0 else 1
        generator = torch.Generator().manual_seed(number)
        rows, *others = adapter.lora_b.shape
        whole = torch.empty(rows * parts, *others).normal_(0, 0.2, generator=generator)
        adapter.lora_b.data = whole.chunk(parts)[world.rank % parts].clone()

def made(kind):
    kind, _, size = kind.partition(":")
    kind, _, norms = kind.partition("+")  # norms of heads that are not in the plan
    fields = {} if kind in tiny.SIZES else {**tiny.SIZES["llama"], **OTHERS}
    if "experts" in str(FAMILIES.get(kind)):
        fields = {name: v for name, v in FAMILIES[kind].fields.items() if name not in ("model_type", "vocab_size")}
    if kind == "phi":
        fields["qk_layernorm"] = bool(norms)
    model = tiny.causal(kind, **fields, **({"vocab_size": int(size)} if size else {}))
    if norms:
        plan = model.config.base_model_tp_plan
        model.config.base_model_tp_plan = {name: style for name, style in plan.items() if "norm" not in name}
    return model

def gradients(model):
    found = {
        f"{name}.{key}": gather(module, key, parameter.grad)
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.grad is not None  # the biases of some routers have none
    }
    model.zero_grad()
    return torch.cat([each.flatten() for each in found.values()])

def other_ways(model):
    # What a language model computes beside plain log-probabilities, and the gradients.
    language, weights = LanguageModel(model), torch.arange(1, len(predicted) + 1)
    total, _ = language(ids, lengths, predicted, 0.7, summed=True)
    total.backward()
    results = {"sum": total.detach(), "gradients of the sum": gradients(model)}
    log_probs, results["entropies"] = language(ids, lengths, predicted, 0.7, with_entropies=True)
    (log_probs * weights).sum().backward()
    results["gradients"] = gradients(model)
    language.chunked = False
    log_probs, _ = language(ids, lengths, predicted)
    (log_probs * weights).sum().backward()
    return results | {"from logits": log_probs.detach(), "gradients of logits": gradients(model)}

def learn(model, group):
    language = LanguageModel(model)
    log_probs, _ = language(ids, lengths, predicted)
    log_probs.sum().backward()
    norm = gradient_norm(language, group)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    return log_probs.detach(), norm

def weights(model):
    return full_weights(module_weights(model))

def far(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()

def answers(model, world, memory=None, **how):
    engine = RolloutEngine(model.eval(), world, memory)
    request = GenerationRequest(prompts, 12, tiny.EOS, Sampling(temperature=0.7), keys, 3, **how)
    return engine.generate(request).responses

def compare(kind, trained):
    whole, part = made(kind), made(kind)
    everything = full_bytes(whole.parameters())
    split_model(part, 2)
    group = next(m for m in part.modules() if split_dim(m) is not None).tensor_group
    share = sum(p.numel() for p in part.parameters()) * 4 / everything
    seen = {"share": share, "size": full_bytes(part.parameters()) - everything}
    for model in (whole, part):
        packed.enable(model)
        if trained:
            adapted(model, trained == "only")
    if not trained:
        theirs, ours = other_ways(whole), other_ways(part)
        seen["ways"] = {name: far(ours[name], theirs[name]) for name in theirs}
    if kind not in FULLY:
        return seen, part
    (expected, norm), (actual, own_norm) = learn(whole, None), learn(part, group)
    seen["outputs"], seen["norm"] = far(actual, expected), abs(own_norm / norm - 1)
    theirs, ours = dict(weights(whole)), {name: weight.clone() for name, weight in weights(part)}
    assert theirs.keys() == ours.keys()
    seen["weights"] = max(far(ours[name], theirs[name]) for name in theirs)
    name = next(name for name in theirs if "fc1.weight" in name or "down_proj" in name)
    seen["moved"] = far(dict(weights(made(kind)))[name], theirs[name])
    alone = answers(whole, world.laid_out(1))
    together, streamed = answers(part, world), answers(part, world, memory=9)
    seen["answers"] = alone == together == streamed and len(alone[0])
    return seen, part

seen = {"compared": {}, "refused": {}}
for name in sys.argv[1:]:
    seen["compared"][name], part = compare(*name.split(" "))
    widest = max(layer.weight.shape[0] for layer in part.modules() if isinstance(layer, torch.nn.Embedding))
    seen["compared"][name]["rows"] = widest
doubled = [prompt for prompt in prompts for _ in range(2)]
alone, shared = (
    RolloutEngine(part, world).generate(
        GenerationRequest(doubled, 6, tiny.EOS, keys=[(3, row) for row in range(10)], group_size=size)
    ).responses
    for size in (1, 2)
)
seen["groups"] = alone == shared and len(set(map(tuple, shared)))
calls = iter(range(100))
try:  # one rank of the group must stop, and both do
    answers(part, world, should_stop=lambda: world.rank == 1 and next(calls) == 3)
except RolloutCancelled:
    seen["dropped"] = True
for name, model in {
    "gpt2": tiny.causal("gpt2"),
    "heads": tiny.causal("llama", num_attention_heads=5, num_key_value_heads=5, hidden_size=40),
    "shared": tiny.causal("llama", num_key_value_heads=1), "width": tiny.causal("opt", ffn_dim=49),
    "experts": tiny.causal("mixtral", num_local_experts=3),
}.items():
    try:
        split_model(model, 2)
    except HpcRlhfError as error:
        seen["refused"][name] = str(error)
print(json.dumps(seen))
"""


# Architectures without adapters, with adapters only, or with adapters and all weights in training. The vocabulary of
# 97 tokens cannot be split.
FULLY = [f"{kind} {adapters}" for kind in ("llama", "mistral", "opt", "qwen2", "qwen3") for adapters in ("", "only")]
FULLY += ["qwen3 also", "phi3 only", "llama:97 ", "opt:97 ", "mixtral ", "mixtral only", "qwen3_moe also"]
FULLY += ["deepseek_v2 only"]
OTHERS = [f"{kind} " for kind in ARCHITECTURES if f"{kind} " not in FULLY] + ["phi+norms ", "qwen3+norms "]


# Of which the plan leaves more than norms and routers whole: attention, other mixers, or experts of all tokens.
LARGER_SHARES = {
    "deepseek_v3 ": 0.65, "granitemoeshared ": 0.65, "hunyuan_v1_moe ": 0.65, "kimi_linear ": 0.65,
    "olmo_hybrid ": 0.65, "granitemoehybrid ": 0.75, "jamba ": 0.75, "lfm2_moe ": 0.75, "afmoe ": 0.75,
}  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    """The reports of two ranks that share every layer."""
    return reports(RANK, [*FULLY, *OTHERS], 2)


@pytest.mark.parametrize("name", FULLY)
def test_a_split_model_matches_the_whole_one(seen: list[dict[str, Any]], name: str) -> None:
    for rank in seen:
        one = rank["compared"][name]
        assert one["share"] < (0.8 if ":97" in name else 0.6), "this rank has more than its share"
        assert one["rows"] == (97 if ":97" in name else 66 if "opt" in name else 48)  # OPT has 66 positions
        assert all(distance < 1e-5 for distance in one.get("ways", {}).values()), one["ways"]
        assert one["size"] == 0
        assert one["outputs"] < 1e-5
        assert one["norm"] < 1e-5
        assert one["weights"] < 1e-5
        assert one["moved"] > 1e-3, "nothing was learned"
        assert one["answers"] > 1


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_compute_and_learn_the_same(seen: list[dict[str, Any]], name: str) -> None:
    for rank in seen:
        one = rank["compared"][name]
        assert one["share"] < LARGER_SHARES.get(name, 0.6), "this rank has more than its share"
        assert all(distance < 1e-4 for distance in one["ways"].values()), one["ways"]


def test_responses_of_a_group_are_those_that_its_prompts_get_alone(seen: list[dict[str, Any]]) -> None:
    assert all(rank["groups"] > 5 for rank in seen)


def test_a_rollout_is_cancelled_by_the_whole_group(seen: list[dict[str, Any]]) -> None:
    assert all(rank["dropped"] for rank in seen)


def test_models_that_cannot_be_split_evenly_are_rejected(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        refused = rank["refused"]
        assert refused.keys() == {"gpt2", "heads", "shared", "width", "experts"}
        assert "does not support gpt2 models" in refused["gpt2"]
        assert "zero: 3" in refused["gpt2"]
        assert "5 attention heads" in refused["heads"]
        assert "1 key and value heads" in refused["shared"]
        assert "49 feed-forward units" in refused["width"]
        assert "3 experts" in refused["experts"]
