"""Recorded decode steps. On a CPU, a tape of tensor operations stands in for a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_rlhf.train.models import packed_attention
from hpc_rlhf.train.rollout.backend import GenerationRequest, RolloutCancelled, Sampling
from hpc_rlhf.train.rollout.in_process import cuda_graphs
from hpc_rlhf.train.rollout.in_process.cuda_graphs import ROW_STEP, RecordedSteps
from hpc_rlhf.train.rollout.in_process.decode_step import DecodeStep
from hpc_rlhf.train.rollout.in_process.engine import RolloutEngine
from hpc_rlhf.train.rollout.in_process.kv_cache import make_rows
from hpc_rlhf.train.runtime.world import World
from tests.train import tiny

NO_EOS = tiny.VOCABULARY
LIMIT = 20
GREEDY, SAMPLED = Sampling(greedy=True), Sampling(1.0, 0.95, 40)
LENGTHS = (7, 1, 24, 4, 12, 2, 9, 9, 3, 5, 21, 6, 2, 8, 11, 1, 3, 4, 5, 6)

# Operations that a graph cannot contain: they synchronize, or copy data from Python.
ON_THE_HOST = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "_unique2", "is_nonzero", "equal")


class Operations(TorchDispatchMode):
    """Records tensor operations with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[tuple[int, torch.Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ON_THE_HOST:
            raise RuntimeError(f"{name} is not permitted when stream is capturing\nand more")
        out = func(*args, **kwargs)
        taken = {storage(tensor) for tensor in tensors((args, kwargs))}
        fresh = [(n, tensor) for n, tensor in enumerate(tensors(out)) if storage(tensor) not in taken]
        self.done.append((func, args, kwargs, fresh))
        return out


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape:
    """Replays the same operations on the same memory, as a CUDA graph does, without the Python in between."""

    def __init__(self) -> None:
        self.recorded = self.played = self.warmed = 0
        self.closed = False

    def warm(self, run: Callable[[], None]) -> None:
        self.warmed += 1
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        with Operations() as tape:
            run()

        def play() -> None:
            assert not self.closed
            self.played += 1
            for func, args, kwargs, fresh in tape.done:
                outputs = tensors(func(*args, **kwargs))
                for number, tensor in fresh:
                    tensor.copy_(outputs[number])

        return play

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """The tapes of all rollouts, which now also record on a CPU."""
    all_tapes: list[Tape] = []

    def recorder(_: torch.device) -> Tape:
        all_tapes.append(Tape())
        return all_tapes[-1]

    monkeypatch.setattr(cuda_graphs, "recorder", recorder)
    yield all_tapes
    assert all(tape.closed for tape in all_tapes)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def respond(engine: RolloutEngine, sampling: Sampling, rows: int, eos_id: int, **how: Any) -> list[list[int]]:
    keys: list[tuple[object, ...]] = [("prompt", name) for name in range(len(LENGTHS))]
    return engine.generate(GenerationRequest(prompts(), LIMIT, eos_id, sampling, keys, rows, **how)).responses


def plain(model: Any, world: World, sampling: Sampling, eos_id: int = NO_EOS) -> list[list[int]]:
    engine = RolloutEngine(model, world)
    engine.step.may_record = False
    return respond(engine, sampling, 50, eos_id)


def synchronize_in(engine: RolloutEngine) -> None:
    """Make a step synchronize with the device, which changes no result."""
    layer = engine.gathered.module.model.layers[0]
    forward = layer.forward
    layer.forward = lambda hidden, *args, **how: (
        forward(hidden, *args, **how) * (1 if bool(hidden.isfinite().all()) else 2)
    )


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_recorded_steps_give_the_same_tokens_when_rows_are_refilled(
    kind: str, sampling: Sampling, world: World, tapes: list[Tape]
) -> None:
    model = tiny.causal(kind, tie_word_embeddings=False)
    free = plain(model, world, sampling)
    ends = {token: {a.index(token) for a in free if token in a[1:]} for token in range(tiny.VOCABULARY)}
    eos_id = max(ends, key=lambda token: len(ends[token]))
    expected = plain(model, world, sampling, eos_id)
    assert len({len(response) for response in expected}) > 2
    engine = RolloutEngine(model, world)
    respond(engine, sampling, 11, eos_id)  # the first rollout begins with a trial, which Python runs
    calls: list[int] = []
    engine.gathered.module.register_forward_pre_hook(
        lambda module, args, how: calls.append(how["input_ids"].shape[1]), with_kwargs=True
    )
    for rows in (11, 50):
        calls.clear()
        assert respond(engine, sampling, rows, eos_id) == expected
        tape = tapes[-1]
        # Python runs a step of each shape at most twice, and once more to allocate the logits.
        assert calls.count(1) == tape.warmed + tape.recorded + 1
        assert 0 < tape.recorded <= 6  # multiples of 8 rows and 32 columns
        assert tape.played > tape.recorded


def test_a_recorded_rollout_uses_the_current_weights(world: World, tapes: list[Tape]) -> None:
    model = tiny.causal("qwen2", tie_word_embeddings=False)
    engine = RolloutEngine(model, world)
    first = respond(engine, SAMPLED, 9, NO_EOS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    second = respond(engine, SAMPLED, 9, NO_EOS)
    assert second != first
    assert second == plain(model, world, SAMPLED)
    assert len(tapes) == 2
    assert engine.step.recorded is None


@torch.no_grad()
def test_a_finished_long_row_does_not_disturb_short_ones(tapes: list[Tape]) -> None:
    """A step still includes its row, but covers fewer columns."""
    model = tiny.causal("llama", tie_word_embeddings=False)
    packed_attention.enable(model)
    step = DecodeStep(model, may_trace=True)
    tokens = [5, 6]
    with step.ready():
        rows = make_rows(step, ROW_STEP, 64)
        rows.begin(0, [tokens, [7] * 40])
        for token in (8, 9, 10, 11):
            tokens.append(token)
            logits = rows.step(torch.tensor([token]))
            expected = model(torch.tensor([tokens])).logits[:, -1]
            assert torch.allclose(logits, expected, atol=1e-4)
    assert tapes[0].played == 2


def test_steps_with_more_rows_than_before_get_a_new_output_buffer() -> None:
    mask, tape = torch.zeros(16, 4), Tape()
    tokens = torch.arange(16.0)
    steps = RecordedSteps(lambda tokens, *_: tokens.unsqueeze(1) * 2, tape)
    for rows in (8, 8, 8, 16, 8, 8, 8, 16, 16):
        tokens += 1
        assert steps.take(tokens[:rows], tokens, tokens, mask[:rows]).flatten().tolist() == [
            2 * token for token in tokens[:rows].tolist()
        ]
    assert tape.recorded == 3
    steps.close()


def test_a_cancelled_rollout_discards_its_recordings(world: World, tapes: list[Tape]) -> None:
    engine = RolloutEngine(tiny.causal("llama"), world)
    asked = iter(range(1000))
    with pytest.raises(RolloutCancelled):
        respond(engine, SAMPLED, 9, NO_EOS, should_stop=lambda: next(asked) == 12)
    assert tapes[0].recorded
    assert tapes[0].closed
    assert engine.step.recorded is None


def test_a_step_that_synchronizes_runs_unrecorded(
    world: World, tapes: list[Tape], capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny.causal("llama", tie_word_embeddings=False)
    engine = RolloutEngine(model, world)
    synchronize_in(engine)
    expected = plain(model, world, SAMPLED)
    for _ in range(2):
        assert respond(engine, SAMPLED, 9, NO_EOS) == expected
    assert [tape.recorded for tape in tapes] == [1]
    assert capfd.readouterr().err.splitlines() == [
        "hpc-rlhf: decode steps run without CUDA graphs, and slower: "
        "_local_scalar_dense is not permitted when stream is capturing"
    ]


def test_length_dependent_positions_are_not_recorded(world: World, tapes: list[Tape]) -> None:
    """Dynamic rotary embeddings depend on the length of a row; a graph would fix one length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    engine = RolloutEngine(tiny.causal("llama", rope_parameters=rope), world)
    respond(engine, GREEDY, 9, NO_EOS)
    assert tapes == []


@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_a_step_reads_and_writes_only_on_the_device(kind: str) -> None:
    """On the meta device, a step that reads a number or copies one from Python fails."""
    rows, columns = ROW_STEP, 32
    with torch.device("meta"):
        model = tiny.causal(kind)
        packed_attention.enable(model)
        config = model.config
        assert config._attn_implementation == packed_attention.NAME
        shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = config.hidden_size // config.num_attention_heads
        buffers = [torch.zeros(rows, columns, shared, dim) for _ in range(4)]
        inputs = (torch.zeros(rows).long(), torch.arange(rows), torch.zeros(rows).long())
        mask = torch.zeros(rows, columns)
    with Operations() as tape:
        logits = DecodeStep(model).forward(*inputs, mask, *buffers)
    assert logits.shape == (rows, tiny.VOCABULARY)
    seen = [tensor for _, args, kwargs, fresh in tape.done for tensor in tensors((args, kwargs, fresh))]
    assert len(seen) > 50
    assert {tensor.device.type for tensor in seen} == {"meta"}


@pytest.mark.gpu
def test_a_step_that_synchronizes_the_gpu_runs_unrecorded(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny.causal("llama", tie_word_embeddings=False).cuda()
    engine = RolloutEngine(model, world)
    expected = respond(engine, SAMPLED, 11, NO_EOS)
    synchronize_in(engine)
    for _ in range(2):
        assert respond(engine, SAMPLED, 11, NO_EOS) == expected
    assert not engine.step.may_record
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_same_bits_and_free_their_memory(
    world: World, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.causal("llama", tie_word_embeddings=False).to("cuda", dtype)
    engine = RolloutEngine(model, world)

    def unrecorded(steps: RecordedSteps, *inputs: torch.Tensor) -> torch.Tensor:
        return steps.forward(*inputs)

    def memory() -> tuple[int, int]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    with monkeypatch.context() as patch:
        patch.setattr(RecordedSteps, "take", unrecorded)
        expected = respond(engine, SAMPLED, 11, NO_EOS)
    recorded: list[object] = []
    record = cuda_graphs.CudaGraphs.record

    def spy(graphs: cuda_graphs.CudaGraphs, run: Callable[[], None]) -> Callable[[], None]:
        recorded.append(graphs)
        return record(graphs, run)

    monkeypatch.setattr(cuda_graphs.CudaGraphs, "record", spy)
    assert respond(engine, SAMPLED, 11, NO_EOS) == expected  # also allocates cuBLAS's workspace, which stays
    before = memory()
    assert respond(engine, SAMPLED, 11, NO_EOS) == expected
    assert recorded
    assert engine.step.may_record
    assert memory() == before
