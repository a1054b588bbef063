"""What makes a decode step fast on a GPU: its kernels are recorded as a CUDA graph, and started all at once.

A step of few rows takes less time for its kernels than Python does to start them one by one. A graph starts the very
kernels that were recorded, so it gives the same bits as the step itself. It knows addresses, not tensors: what a step
reads and writes must stay where it is, and so graphs last for one rollout, as do the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Rows of a step are a multiple of so many, the last ones unused, so that shapes seldom change.
ROW_STEP = 8


class Recorder(Protocol):
    """Records what a function does to tensors, to do it again without the function."""

    def warm(self, run: Callable[[], None]) -> None:
        """Call a function as it will be recorded, so that libraries make ready what they need."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that does again what ``run`` does; it is not done yet."""

    def close(self) -> None:
        """Forget all that was recorded."""


def recorder(device: torch.device) -> Recorder | None:
    """What records steps on a device, if anything does."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """CUDA graphs, replayed one after the other, which share the memory that they work in.

    That memory goes back to the allocator with ``close``.
    """

    def __init__(self, device: torch.device) -> None:
        # Warmed on the stream it is recorded on, a step finds cuBLAS's workspace there, which outlives the graphs.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def warm(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads copy checkpoints and watch over NCCL meanwhile. Where recording fails, torch stays on its stream;
        # the outer block leaves it.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.stream.device)),
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            run()
        self.graphs.append(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    def close(self) -> None:
        for graph in self.graphs:
            graph.reset()
        self.graphs.clear()


class RecordedSteps:
    """A decode step that is recorded for each shape when it comes a second time, for one rollout.

    Where recording fails, the step goes on as it is, and one line on stderr says why.

    Attributes:
        failed: recording did.
    """

    def __init__(self, forward: Callable[..., Tensor], using: Recorder) -> None:
        self.forward = forward
        self.using = using
        self.failed = False
        self.steps: dict[tuple[object, ...], Callable[[], None] | None] = {}  # None: came once
        self.logits: Tensor | None = None  # (rows, vocabulary), where all steps put them

    def rows(self, live: int, room: int) -> int:
        """How many rows a step of so many live ones takes, where there is room for so many."""
        return live if self.failed else min(-(-live // ROW_STEP) * ROW_STEP, room)

    def take(self, *inputs: Tensor) -> Tensor:
        """The same as ``forward``; the logits last until the next step."""
        if self.failed:
            return self.forward(*inputs)
        rows = len(inputs[0])
        if self.logits is None or len(self.logits) < rows:
            self.steps.clear()  # they put them elsewhere
            self.logits = self.forward(*inputs).clone()
            return self.logits
        logits = self.logits[:rows]

        def run() -> None:
            logits.copy_(self.forward(*inputs))

        key = (inputs[3].shape, *[tensor.data_ptr() for tensor in inputs])
        if key not in self.steps:
            self.using.warm(run)
            self.steps[key] = None
            return logits
        step = self.steps[key] or self._recorded(run)
        if step is None:
            return self.forward(*inputs)
        self.steps[key] = step
        step()
        return logits

    def _recorded(self, run: Callable[[], None]) -> Callable[[], None] | None:
        try:
            return self.using.record(run)
        except RuntimeError as error:  # what the device, its memory or the model does not allow
            self.failed = True
            first: BaseException = error
            while first.__context__ is not None:  # ending a recording that failed fails, too
                first = first.__context__
            reason = (str(first).strip() or type(first).__name__).splitlines()[0]
            print(
                f"hpc-rlhf: decode steps run without CUDA graphs, and slower: {reason}",
                file=sys.stderr,
                flush=True,
            )
            return None

    def close(self) -> None:
        self.steps.clear()
        self.using.close()
        self.logits = None
