"""The thread that runs the model. Concurrent requests share its forward passes."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.rollout.in_process.open_batch import Request
from hpc_rlhf.train.rollout.vllm.open_batch import AnyBatch

# Receives a request's next token, None after the last one, or the exception that ended it.
Deliver = Callable[[int | Exception | None], None]


# For a step to end.
_STOP_SECONDS = 30.0


class Worker(threading.Thread):
    """Advances a batch while there are requests in it.

    Args:
        lost: called with the reason each time the batch can draw no more.
    """

    def __init__(self, batch: AnyBatch, lost: Callable[[HpcRlhfError], object]) -> None:
        super().__init__(name="model", daemon=True)
        self.batch, self.lost = batch, lost
        self._deliver: dict[Request, Deliver] = {}
        # A request with its receiver to begin it, or with None to end it; None to stop the thread.
        self._inbox: queue.SimpleQueue[tuple[Request, Deliver | None] | None] = queue.SimpleQueue()

    async def tokens(self, request: Request) -> AsyncGenerator[int, None]:
        """The tokens of a response as they are drawn; whoever stops iterating ends the request."""
        loop = asyncio.get_running_loop()
        received: asyncio.Queue[int | Exception | None] = asyncio.Queue()

        def deliver(item: int | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(received.put_nowait, item)

        self._inbox.put((request, deliver))
        try:
            while (item := await received.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._inbox.put((request, None))

    def stop(self) -> None:
        """End the thread, and wait for it unless it hangs."""
        self._inbox.put(None)
        self.join(_STOP_SECONDS)

    def run(self) -> None:
        while self._take_orders():
            try:
                for request in self.batch.advance():
                    self._deliver[request](request.tokens[-1])
                    if self.batch.is_finished(request):
                        self._deliver.pop(request)(None)
            except Exception as error:  # such as too little memory, which may suffice for the next requests
                if isinstance(error, HpcRlhfError):
                    self.lost(error)
                else:
                    traceback.print_exc(file=sys.stderr)
                for deliver in self._deliver.values():
                    deliver(error)
                self._deliver.clear()
                with suppress(Exception):  # a broken device also fails the next requests, which report it
                    self.batch.clear()

    def _take_orders(self) -> bool:
        """Begin and end requests as asked; wait while there is none to advance. False if the thread is to stop."""
        while not self._deliver or not self._inbox.empty():
            order = self._inbox.get()
            if order is None:
                return False
            request, deliver = order
            if deliver is not None:
                self.batch.add(request)
                self._deliver[request] = deliver
            elif self._deliver.pop(request, None):
                self.batch.remove(request)
        return True
