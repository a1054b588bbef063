"""Packed attention by the kernel for varying lengths gives what the loop over sequences gives, where it is used.

The kernel runs on GPUs only. On a CPU, a stand-in computes what torch documents for it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_rlhf.train.models import packed_attention, varlen
from hpc_rlhf.train.models.language_model import LanguageModel
from hpc_rlhf.train.ragged import Ragged
from tests.train import tiny

LENGTHS = (5, 1, 33, 8)
CLOSE = {"atol": 0.03, "rtol": 0.02}
HEADS = pytest.mark.parametrize(
    ("heads", "key_heads", "window"), [(2, 2, None), (4, 2, None), (2, 2, 1), (4, 1, 6), (2, 2, 33), (2, 2, 100)]
)


class StandIn:
    """Attention in float64, one query at a time; ``calls`` counts."""

    calls = 0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        self.calls += 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert window_size[1] == 0
        assert enable_gqa or query.shape[1] == key.shape[1]
        ends = cu_seq_q.tolist()
        assert max_q == max_k == max(end - start for start, end in pairwise(ends))
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
        scale = scale or query.shape[2] ** -0.5
        rows = []
        for start, end in pairwise(ends):
            for place in range(start, end):
                first = start if window_size[0] < 0 else max(start, place - window_size[0])
                seen = slice(first, place + 1)
                scores = torch.einsum("hd,khd->hk", query[place].double(), key[seen].double()) * scale
                rows.append(torch.einsum("hk,khd->hd", scores.softmax(dim=1), value[seen].double()))
        return torch.stack(rows).to(query.dtype)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    kernel = StandIn()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "runs_on", lambda device: True)
    return kernel


def inputs(heads: int = 2, key_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Query, key and value as layers make them, with tokens outermost in memory."""
    torch.manual_seed(0)
    rows = [torch.randn(1, sum(LENGTHS), count, dim).transpose(1, 2) for count in (heads, key_heads, key_heads)]
    return [each.to(dtype).requires_grad_() for each in rows]


def attend(heads: list[Tensor], **more: Any) -> list[Tensor]:
    """The output of packed attention, and its gradients."""
    output, _ = packed_attention.attention(None, *heads, None, packed_lengths=LENGTHS, **more)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad((output * weight).sum(), heads)]


@HEADS
def test_output_and_gradients_are_those_of_the_loop(
    stand_in: StandIn, heads: int, key_heads: int, window: int | None
) -> None:
    by_kernel = attend(inputs(heads, key_heads), sliding_window=window, scaling=0.3)
    assert stand_in.calls == 1
    by_loop = attend(inputs(heads, key_heads, dtype=torch.float32), sliding_window=window, scaling=0.3)
    assert stand_in.calls == 1
    for one, other in zip(by_kernel, by_loop, strict=True):
        torch.testing.assert_close(one.float(), other, **CLOSE)


@pytest.mark.parametrize("fields", [{"dtype": torch.float32}, {"dim": 12}, {"dim": 200}, {"key_heads": 1}])
def test_the_loop_remains_where_the_kernel_does_not_apply(
    stand_in: StandIn, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "key_heads" in fields:  # as in a torch whose kernel has no grouped queries
        monkeypatch.setattr(varlen, "ACCEPTED", varlen.ACCEPTED - {"enable_gqa"})
    attend(inputs(**fields))
    assert stand_in.calls == 0


def test_the_loop_remains_for_dropout_and_for_values_of_another_size(stand_in: StandIn) -> None:
    query, key, value = inputs()
    attend([query, key, value], dropout=0.5)
    attend([query, key, inputs(dim=24)[2]])
    assert stand_in.calls == 0


@pytest.mark.parametrize("kind", ["opt", "llama", "mistral"])
@torch.no_grad()
def test_every_layer_of_a_model_uses_it(stand_in: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal(kind, **({"sliding_window": 5} if kind == "mistral" else {})).bfloat16()
    packed_attention.enable(model)
    batch = Ragged.of([torch.randint(3, tiny.VOCABULARY, (length,)).tolist() for length in LENGTHS])
    asked = (batch.ids, batch.lengths, batch.tail([length - 1 for length in LENGTHS]))
    by_kernel, _ = LanguageModel(model)(*asked)
    assert stand_in.calls == model.config.num_hidden_layers
    monkeypatch.setattr(varlen, "runs_on", lambda device: False)
    by_loop, _ = LanguageModel(model)(*asked)
    torch.testing.assert_close(by_kernel, by_loop, atol=0.1, rtol=0.05)


def test_torch_accepts_the_arguments() -> None:
    """Its kernel has shapes, but no values, on the meta device."""
    if "enable_gqa" not in varlen.ACCEPTED:
        pytest.skip("this torch has no kernel with grouped queries")
    heads = [each.detach().to("meta").requires_grad_() for each in inputs(4, 2)]
    output = varlen.attention(*heads, LENGTHS, 0.3, 6)
    assert output.shape == (1, sum(LENGTHS), 4, 16)
    grads = torch.autograd.grad(output.sum(), heads)
    assert [grad.shape for grad in grads] == [each.shape for each in heads]


@pytest.mark.gpu
@HEADS
def test_on_a_gpu_output_and_gradients_are_those_of_the_loop(
    heads: int, key_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [each.detach().cuda().requires_grad_() for each in inputs(heads, key_heads)]
    if not varlen.supports(*here, 0.0):
        pytest.skip("this torch or GPU has no such kernel")
    by_kernel = attend(here, sliding_window=window, scaling=0.3)
    monkeypatch.setattr(varlen, "runs_on", lambda device: False)
    for one, other in zip(by_kernel, attend(here, sliding_window=window, scaling=0.3), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
