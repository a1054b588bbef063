"""Fast decode steps on a GPU: kernels are recorded as a CUDA graph and launched all at once.

With few rows, a step's kernels take less time than Python needs to launch them one by one. A graph launches
the very kernels that were recorded, so it gives the same bits. It refers to addresses, not tensors: what a
step reads and writes must stay in place, so graphs live for one rollout, as the weights do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

# A step has a multiple of this many rows, the last ones unused, so that shapes seldom change.
ROW_STEP = 8


def recorder(device: torch.device) -> CudaGraphs | None:
    """The recorder for a device, if there is one."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """Records what functions do to tensors. The graphs are replayed one at a time and share their working memory."""

    def __init__(self, device: torch.device) -> None:
        # Warming up on the recording stream allocates cuBLAS's workspace there, where it outlives the graphs.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def warm(self, run: Callable[[], None]) -> None:
        """Call a function as it will be recorded, so that libraries set up what they need."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that replays what ``run`` does; recording does not do it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads copy checkpoints and watch NCCL meanwhile. If recording fails, torch stays on its
        # stream; the outer block leaves it.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.stream.device)),
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            run()
        self.graphs.append(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    def close(self) -> None:
        """Discard all recordings and free their memory."""
        for graph in self.graphs:
            graph.reset()
        self.graphs.clear()


class RecordedSteps:
    """A decode step that is recorded the second time each shape occurs, for one rollout.

    If recording fails, steps run unrecorded, and one line on stderr gives the reason.
    """

    def __init__(self, forward: Callable[..., Tensor], using: CudaGraphs) -> None:
        self.forward = forward
        self.using = using
        self.failed = False
        self.steps: dict[tuple[object, ...], Callable[[], None] | None] = {}  # None: occurred once
        self.logits: Tensor | None = None  # (rows, vocabulary), the output of all steps

    def rows(self, live: int, room: int) -> int:
        """Rows of a step with ``live`` live rows, given ``room`` rows."""
        return live if self.failed else min(-(-live // ROW_STEP) * ROW_STEP, room)

    def take(self, *inputs: Tensor) -> Tensor:
        """The same as ``forward``; the logits are valid until the next step."""
        if self.failed:
            return self.forward(*inputs)
        rows = len(inputs[0])
        if self.logits is None or len(self.logits) < rows:
            self.steps.clear()  # they write elsewhere
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
        except RuntimeError as error:  # the device, its memory or the model does not allow it
            self.failed = True
            first: BaseException = error
            while first.__context__ is not None:  # ending a failed recording fails as well
                first = first.__context__
            reason = (str(first).strip() or type(first).__name__).splitlines()[0]
            print(f"hpc-rlhf: decode steps run without CUDA graphs, and slower: {reason}", file=sys.stderr, flush=True)
            return None

    def close(self) -> None:
        self.steps.clear()
        self.using.close()
        self.logits = None
