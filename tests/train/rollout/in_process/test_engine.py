"""Responses match transformers, end at the first EOS, and do not depend on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_rlhf.spec.sizes import ALIGNED
from hpc_rlhf.spec.training import LoraSpec
from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.models.lora import LoraLinear, adapt
from hpc_rlhf.train.rollout.backend import GenerationRequest, RolloutCancelled, Sampling
from hpc_rlhf.train.rollout.in_process import engine as engines
from hpc_rlhf.train.rollout.in_process.decode_step import TRACED_AFTER, TRIAL_STEPS, DecodeStep
from hpc_rlhf.train.rollout.in_process.decoding import decode
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.rollout.in_process.kv_cache import BatchedRows, SingleRows, WholeRows
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny

NO_EOS = tiny.VOCABULARY  # a token that is never drawn
LENGTHS = (7, 1, 12, 4, 12, 2, 40)
LIMIT = 14
SAMPLING = Sampling(1.0, 0.95, 40)
GREEDY = Sampling(greedy=True)
# Its soft-capped scores are not supported by packed attention.
UNPACKED = "gemma2"


# Its attention window is shorter than the prompts and responses here.
WINDOWED = "mistral"


@pytest.fixture(scope="module", params=[*tiny.KINDS, UNPACKED, WINDOWED])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == UNPACKED:
        return other(UNPACKED, head_dim=8)
    if request.param == WINDOWED:
        return other(WINDOWED, sliding_window=9)
    return tiny.causal(request.param, tie_word_embeddings=False)  # tied embeddings soon repeat themselves


def other(kind: str, **fields: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=tiny.VOCABULARY, initializer_range=0.2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, **fields,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def generate(
    engine: RolloutEngine, prompts: list[list[int]], keys: list[tuple[object, ...]] | None = None,
    sampling: Sampling = GREEDY, eos_id: int = NO_EOS, rows: int = 3, limit: int = LIMIT, **how: Any,
) -> list[list[int]]:  # fmt: skip
    """Responses to prompts."""
    return engine.generate(GenerationRequest(prompts, limit, eos_id, sampling, keys, rows, **how)).responses


def sampled(
    engine: RolloutEngine, names: list[int], eos_id: int = NO_EOS, rows: int = 3, **how: Any
) -> list[list[int]]:
    """Responses to the prompts with these numbers, each with its own key."""
    every = prompts()
    keys: list[tuple[object, ...]] = [("prompt", name) for name in names]
    return generate(engine, [every[name] for name in names], keys, SAMPLING, eos_id, rows, **how)


def frequent(engine: RolloutEngine) -> int:
    """A token that ends responses to the prompts at different lengths."""
    responses = sampled(engine, list(range(len(LENGTHS))))
    lengths = {
        token: {response.index(token) for response in responses if token in response[1:]}
        for token in range(tiny.VOCABULARY)
    }
    return max(lengths, key=lambda token: len(lengths[token]))


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_greedy_responses_match_transformers_token_for_token(model: Any, world: World, rows: int) -> None:
    engine = RolloutEngine(model, world)
    for seed in range(3):
        ids, mask = tiny.pad_left(prompts(seed))
        expected = model.generate(
            ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=LIMIT, eos_token_id=None,
            pad_token_id=tiny.PAD,
        )[:, ids.shape[1] :]  # fmt: skip
        assert generate(engine, prompts(seed), rows=rows) == expected.tolist()
        assert len(expected.unique()) > 8, "a model that repeats itself proves nothing"


def test_architectures_use_packed_attention_if_supported(model: Any, world: World) -> None:
    way = RolloutEngine(model, world).gathered.module.config._attn_implementation
    assert (way == packed_attention.NAME) == (model.config.model_type != UNPACKED)


def test_a_response_does_not_depend_on_the_batch(model: Any, world: World) -> None:
    engine = RolloutEngine(model, world)
    names = list(range(len(LENGTHS)))
    eos_id = frequent(engine)  # so that rows are refilled at different times
    together = sampled(engine, names, eos_id, rows=len(names))
    assert len({len(response) for response in together}) > 2
    for rows in (1, 2, 3):
        assert sampled(engine, names, eos_id, rows) == together
    assert sampled(engine, names[::-1], eos_id) == together[::-1]
    for name in names:
        assert sampled(engine, [name], eos_id) == [together[name]]
    other = generate(engine, prompts(), [("other", n) for n in names], SAMPLING, eos_id)
    assert all(one != another for one, another in zip(other, together, strict=True))


def test_a_response_ends_with_its_first_eos(model: Any, world: World) -> None:
    engine = RolloutEngine(model, world)
    names = list(range(len(LENGTHS)))
    free = sampled(engine, names)
    assert all(len(response) == LIMIT for response in free)
    ends = set()
    for eos_id in sorted({token for response in free for token in response[2:9]})[::6]:
        for response, drawn in zip(sampled(engine, names, eos_id), free, strict=True):
            length = drawn.index(eos_id) + 1 if eos_id in drawn else LIMIT
            assert response == drawn[:length]
            ends.add(length)
    assert len(ends) > 3


def test_sampled_responses_follow_the_models_distribution(world: World) -> None:
    """Pairs of tokens from a vocabulary of five, compared with the probabilities of whole forward passes."""
    model = tiny.causal("llama", vocab_size=5, tie_word_embeddings=False)
    prompt, count = [3, 4, 3], 6000
    keys: list[tuple[object, ...]] = [(11, number) for number in range(count)]
    pairs = generate(RolloutEngine(model, world), [prompt] * count, keys, Sampling(1.5), rows=1000, limit=2)
    after = torch.tensor([[*prompt, token] for token in range(5)])
    with torch.no_grad():
        probabilities = torch.softmax(model(after).logits.double() / 1.5, dim=-1)
    expected = (probabilities[0, len(prompt) - 1].unsqueeze(1) * probabilities[:, len(prompt)]).flatten() * count
    counts = torch.bincount(torch.tensor([5 * first + second for first, second in pairs]), minlength=25)
    common = expected > 5
    chi_square = float(((counts - expected) ** 2 / expected)[common].sum())
    assert common.sum() >= 15
    assert chi_square < 51.2  # the 99.9 % point for 24 degrees of freedom


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cancelled_rollout_repeats_bit_for_bit(world: World, dtype: torch.dtype) -> None:
    """Also if decode steps are traced from then on."""
    engine = RolloutEngine(tiny.causal("opt").to(dtype), world)
    names = list(range(len(LENGTHS)))
    eos_id = frequent(engine)
    seen: list[torch.Tensor] = []
    take = engine.step.take

    def spy(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(take(*inputs))
        return seen[-1]

    engine.step.take = spy  # type: ignore[method-assign]
    engine.step.steps_to_trace = TRACED_AFTER
    expected = sampled(engine, names, eos_id)
    undisturbed, forwards = list(seen), len(seen) + 2
    assert len(undisturbed) > 12
    assert engine.step.trace is None
    for step in range(0, forwards, 3):
        calls = iter(range(forwards))
        with pytest.raises(RolloutCancelled):
            sampled(engine, names, eos_id, should_stop=lambda calls=calls, step=step: next(calls) == step)
        seen.clear()
        assert sampled(engine, names, eos_id) == expected
        assert all(torch.equal(one, other) for one, other in zip(seen, undisturbed, strict=True))
    assert engine.step.trace is not None


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_traced_step_gives_the_same_bits_for_other_rows_and_weights(
    world: World, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.causal(kind).to(dtype)
    engine, plain = RolloutEngine(model, world), RolloutEngine(model, world)
    engine.step.steps_to_trace, plain.step.steps_to_trace = 2, -1
    seen: dict[int, list[torch.Tensor]] = {id(engine.step): [], id(plain.step): []}
    take = DecodeStep.take

    def spy(step: DecodeStep, *inputs: torch.Tensor) -> torch.Tensor:
        seen[id(step)].append(take(step, *inputs))
        return seen[id(step)][-1]

    monkeypatch.setattr(DecodeStep, "take", spy)
    for rows in (2, 3, 4):
        for one in (engine, plain):
            sampled(one, list(range(len(LENGTHS))), rows=rows)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True))
    assert engine.step.trace is not None
    assert engine.step.trial_steps == 0
    assert plain.step.trace is None


def test_a_step_that_a_trace_cannot_follow_is_not_traced(world: World) -> None:
    """A trace would fix a branch that depends on the tokens, so the model runs untraced."""
    engine = RolloutEngine(tiny.causal("llama"), world)
    sampled(engine, [0])  # the rows of this model depend on each other, which the trial would notice
    layer = engine.gathered.module.model.layers[0]
    forward = layer.forward
    layer.forward = lambda hidden, *args, **how: forward(hidden, *args, **how) * (1 if hidden.sum() > 0 else 2)
    expected = sampled(engine, [0, 1, 2])
    engine.step.steps_to_trace = 2
    assert sampled(engine, [0, 1, 2]) == expected
    assert engine.step.steps_to_trace < 0
    assert engine.step.trace is None


def test_a_trace_that_differs_later_is_discarded(world: World) -> None:
    engine = RolloutEngine(tiny.causal("llama"), world)
    layer = engine.gathered.module.model.layers[0]
    forward, long = layer.forward, 30
    layer.forward = lambda hidden, *args, **how: (
        forward(hidden, *args, **how) * (1 if int(how["position_ids"].max()) < long else 2)
    )
    expected = sampled(engine, [6], rows=1)  # a prompt of 40 tokens
    engine.step.steps_to_trace = 2
    sampled(engine, [0, 1, 2, 3])  # of 12 at most
    assert engine.step.trace is not None
    assert 0 < engine.step.trial_steps < TRIAL_STEPS
    assert sampled(engine, [6], rows=1) == expected
    assert engine.step.trace is None


def test_a_rollout_leaves_the_model_and_its_mode_alone_and_has_no_dropout(world: World) -> None:
    model = tiny.causal("gpt2", resid_pdrop=0.5).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    engine = RolloutEngine(model, world)
    expected = sampled(RolloutEngine(tiny.causal("gpt2"), world), [0, 1, 2])
    assert sampled(engine, [0, 1, 2]) == expected
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert sum(weight.numel() for weight in engine.gathered.module.parameters()) == 0


def test_the_next_rollout_uses_the_trained_weights(world: World) -> None:
    model = tiny.causal("opt")
    engine = RolloutEngine(model, world)
    first = sampled(engine, [0, 1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    second = sampled(engine, [0, 1])
    assert second != first
    assert second == sampled(RolloutEngine(model, world), [0, 1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_are_merged(kind: str, world: World) -> None:
    model = tiny.causal(kind, tie_word_embeddings=False)
    plain = generate(RolloutEngine(model, world), prompts())
    adapt(model, LoraSpec(rank=4), 1)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_b, 0, 0.1)
    engine = RolloutEngine(model, world)
    assert not any(isinstance(module, LoraLinear) for module in engine.gathered.module.modules())
    responses = generate(engine, prompts())
    expected = [
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LIMIT, eos_token_id=None)
        for prompt in prompts()
    ]
    assert responses == [row[0, len(p) :].tolist() for row, p in zip(expected, prompts(), strict=True)]
    assert responses != plain


def test_the_batch_is_limited_by_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal("qwen2")
    # 2 layers x 2 of 4 heads share keys and values x 8 numbers x 4 bytes, keys and values: 256 bytes a token.
    tokens = max(LENGTHS) + LIMIT
    asked: list[int] = []

    def spy(*args: Any) -> Any:
        asked.append(args[1].max_batch)
        return decode(*args)

    monkeypatch.setattr(engines, "decode", spy)
    for room, rows in ((1.5, 1), (2.5, 2), (0.5, 1), (99.0, 4)):
        memory = int(room * 256 * tokens / engines.CACHE_SHARE)
        sampled(RolloutEngine(model, world, memory), list(range(len(LENGTHS))), rows=4)
        assert asked.pop() == rows


def test_a_step_computes_only_live_rows(world: World) -> None:
    """Rows that end when no prompt is waiting leave the batch; others are refilled."""
    model = tiny.causal("llama", tie_word_embeddings=False)
    engine = RolloutEngine(model, world)
    names = list(range(len(LENGTHS)))
    eos_id = frequent(engine)
    shapes: list[tuple[int, ...]] = []
    engine.gathered.module.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    responses = sampled(engine, names, eos_id, rows=4)
    stepped = sum(rows for rows, tokens in shapes if tokens == 1)
    assert stepped == sum(len(response) - 1 for response in responses)
    assert all(rows == 1 and tokens % ALIGNED == 0 for rows, tokens in shapes if tokens > 1)
    assert max(rows for rows, _ in shapes) == 4


def test_waiting_prompts_share_a_forward_pass(world: World) -> None:
    engine = RolloutEngine(tiny.causal("llama", tie_word_embeddings=False), world)
    one, few = [[5, 6, 7]] * 60, Sampling(temperature=2.0)
    keys: list[tuple[object, ...]] = [(number,) for number in range(60)]
    eos_id = generate(engine, one[:1], keys[:1], few)[0][3]
    begun: list[int] = []
    engine.gathered.module.register_forward_pre_hook(
        lambda module, args, how: begun.append(len(how.get("packed_lengths", ()))), with_kwargs=True
    )
    responses = generate(engine, one, keys, few, eos_id, 32)
    begun = [prompts - 1 for prompts in begun if prompts]  # one is padding
    assert begun[0] == 32
    assert sum(begun) == 60
    assert len(begun) > 3
    assert all(prompts >= 4 for prompts in begun[1:-1])
    assert responses == generate(engine, one, keys, few, eos_id, 60)


def test_tokens_are_yielded_as_they_are_drawn() -> None:
    model = tiny.causal("llama")
    packed_attention.enable(model)
    request = GenerationRequest([[5, 6], [7]], LIMIT, NO_EOS, keys=[("a",), ("b",)])
    steps = decode(DecodeStep(model), request)
    assert [number for number, _ in next(steps)] == [0, 1]
    assert len(list(steps)) == LIMIT - 1


def test_no_prompts_give_no_responses(world: World) -> None:
    assert generate(RolloutEngine(tiny.causal("llama"), world), [], [], SAMPLING) == []


GROUP = 3


def in_groups(engine: RolloutEngine, group_size: int, rows: int, eos_id: int, sampling: Sampling) -> list[list[int]]:
    """Responses to each prompt GROUP times."""
    repeated = [prompt for prompt in prompts() for _ in range(GROUP)]
    keys: list[tuple[object, ...]] = [("group", number) for number in range(len(repeated))]
    return generate(engine, repeated, keys, sampling, eos_id, rows, limit=8, group_size=group_size)


@pytest.mark.parametrize("way", [BatchedRows, SingleRows, WholeRows])
def test_a_group_gets_the_responses_that_its_prompts_would_get_alone(world: World, way: type) -> None:
    engine = RolloutEngine(tiny.causal("llama", tie_word_embeddings=False), world)
    eos_id = frequent(engine)  # so that rows are refilled at different times
    engine.step.ways = (way,)
    alone = in_groups(engine, 1, 50, eos_id, SAMPLING)
    for rows in (4, 50):
        assert in_groups(engine, GROUP, rows, eos_id, SAMPLING) == alone
    assert len({tuple(response) for response in alone}) > 2 * len(LENGTHS), "the responses of a group differ"


def test_a_group_reads_its_prompt_once(world: World) -> None:
    engine = RolloutEngine(tiny.causal("llama", tie_word_embeddings=False), world)
    engine.generate(GenerationRequest([[5]], 1, NO_EOS, GREEDY))  # the trial
    begun: list[int] = []
    engine.gathered.module.register_forward_pre_hook(
        lambda module, args, how: begun.extend(how.get("packed_lengths", ())[:-1]), with_kwargs=True
    )
    for rows in (50, 6, 2):  # all at once; two groups at a time; less than a group
        in_groups(engine, GROUP, rows, NO_EOS, SAMPLING)
        times = 2 if rows < GROUP else 1
        assert sorted(begun) == sorted(length for length in LENGTHS for _ in range(times))
        begun.clear()


def test_prompts_of_a_group_must_be_equal() -> None:
    with pytest.raises(AssertionError, match="different prompts"):
        GenerationRequest([[5], [5], [6], [5]], 1, NO_EOS, group_size=2)
