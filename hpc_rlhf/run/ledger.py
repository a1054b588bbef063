"""The ledger of a run: an append-only record, one JSON object a line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Events, and the fields each carries beside time, event and stage:
#   submitting  token, by                    about to call sbatch; by heal, or a person where it does not say
#   submitted   token, job_id                sbatch answered
#   refused     token, message               sbatch said no
#   started     attempt, job_id, restart, ranks, host, age, versions    age: seconds since rank 0's process began
#   resumed     attempt, step, part          part: of the step after those, if some of it is done
#   ready       attempt, step, part          all is loaded: the attempt's first step, or part of one, begins
#   saved       attempt, step, part, seconds, stall     how long it took, and how long training stood still for it
#   stopping    attempt, step, part, reason, dropped   all ranks agreed to stop; seconds of work after that point
#   hang        attempt, message, host       a rank did not move any more; all wrote down where they were
#   requeued    attempt, step, reason
#   interrupted attempt, step                stopped by a person, here, to be run again
#   failed      attempt, message
#   finished    attempt, step, seconds
#   cancelled   job_id                       by hpc-rlhf cancel; with attempt, by hand, as a rank found
#   ended       job_id, reason, message, node, step, progress, seen   how an attempt ended that is not finished; when
#                                            it wrote its last step, by its own clock
#   retried     job_id, delay, without       heal sent it off again, after so many seconds, without these nodes
#   stopped     message                      heal leaves it to a person
#   anew        -                            a person lets it go on; what failed before counts no more


@dataclass(frozen=True)
class Ledger:
    """Appends events, and reads them back.

    Every line is written by one ``write`` to a file opened for append, so that lines of several
    writers never mix on a POSIX file system. A line that a crash or a full disk cut short is closed
    before the next one, which would otherwise be lost with it.
    """

    path: Path

    def append(self, event: str, stage: str | None = None, **fields: Any) -> None:
        record: dict[str, Any] = {"time": round(time.time(), 3), "event": event}
        if stage is not None:
            record["stage"] = stage
        line = json.dumps({**record, **fields}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            os.write(fd, ("\n" * torn + line).encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def events(self, stage: str | None = None) -> Iterator[dict[str, Any]]:
        """The events in the order written; a torn line is passed over."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for record in parse_events(text):
            if stage is None or record.get("stage") == stage:
                yield record

    def last(self, event: str, stage: str | None = None) -> dict[str, Any] | None:
        found = None
        for record in self.events(stage):
            if record.get("event") == event:
                found = record
        return found


def parse_events(text: str) -> Iterator[dict[str, Any]]:
    """The events in a ledger's text, or in the end of one; a torn line is passed over."""
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
