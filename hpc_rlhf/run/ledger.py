"""The ledger of a run: an append-only record of its events, one JSON object per line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hpc_rlhf.run import events
from hpc_rlhf.run.events import Event
from hpc_rlhf.run.files import append_line
from hpc_rlhf.run.masking import mask_all

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Ledger:
    """Appends events and reads them back."""

    path: Path

    def append(self, event: Event) -> None:
        """Write an event with the current time, with secrets masked: messages may quote lines of ``slurm.setup``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, json.dumps(mask_all(events.to_json(replace(event, time=round(time.time(), 3))))))

    def events(self, stage: str | None = None) -> Iterator[Event]:
        """The events, of one stage or of all, in the order written."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for event in events.parse(text):
            if stage is None or event.stage == stage:
                yield event

    def last(self, kind: type[E], stage: str | None = None) -> E | None:
        """The last event of a kind."""
        return next((each for each in reversed(list(self.events(stage))) if isinstance(each, kind)), None)
