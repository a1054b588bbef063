"""The events of a run's ledger, one dataclass each, and how they turn into JSON and back.

The names and fields on disk are a format: run directories of other versions are read and resumed. So a reader
skips unknown events and unknown fields, and a missing field has its default. The docstrings of the events are
their descriptions in docs/run-directory.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, ClassVar, Literal

KINDS: dict[str, type[Event]] = {}


def _omitted(default: Any) -> Any:
    """A field that is left out of the JSON while it has its default."""
    return field(default=default, metadata={"omitted": True})


@dataclass(frozen=True)
class Event:
    """Something that happened to a stage.

    Attributes:
        name: the event's name on disk; the bases have none.
        time: when it was written, in Unix seconds by the writer's clock; the ledger sets it.
    """

    name: ClassVar[str]
    stage: str = ""
    _: KW_ONLY
    time: float = 0.0

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:
            cls.name, KINDS[name] = name, cls


@dataclass(frozen=True, kw_only=True)
class AttemptEvent(Event):
    """An event that an attempt wrote about itself."""

    attempt: str = ""


@dataclass(frozen=True, kw_only=True)
class Submitting(Event, name="submitting"):
    """about to call sbatch, for a `person` or for `heal`"""

    token: str = ""
    by: Literal["person", "heal"] = "person"


@dataclass(frozen=True, kw_only=True)
class Submitted(Event, name="submitted"):
    """sbatch accepted the job"""

    token: str = ""
    job_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Refused(Event, name="refused"):
    """sbatch rejected the job"""

    token: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Started(AttemptEvent, name="started"):
    """rank 0 is up; age: seconds since its process started; job_id: null without Slurm"""

    job_id: str | None = None
    restart: int = 0
    ranks: int = 0
    host: str = ""
    age: float = 0.0
    versions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlaceEvent(AttemptEvent):
    """An event at a place in the training: steps done, and parts done of the step after those."""

    step: int = 0
    part: int = _omitted(0)

    @property
    def place(self) -> tuple[int, int]:
        return self.step, self.part


@dataclass(frozen=True, kw_only=True)
class Resumed(PlaceEvent, name="resumed"):
    """a checkpoint was loaded; part: parts done of the step after it, left out when 0"""


@dataclass(frozen=True, kw_only=True)
class Ready(PlaceEvent, name="ready"):
    """everything is loaded and the first step begins"""


@dataclass(frozen=True, kw_only=True)
class Saved(PlaceEvent, name="saved"):
    """a checkpoint is complete; seconds: how long saving took; stall: how long training stood still for it"""

    seconds: float = 0.0
    stall: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stopping(PlaceEvent, name="stopping"):
    """all ranks agreed to stop; dropped: seconds of work after the saved place"""

    reason: str = ""
    dropped: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Requeued(AttemptEvent, name="requeued"):
    """the stage requeued its own job"""

    step: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Interrupted(AttemptEvent, name="interrupted"):
    """the user stopped a run without Slurm"""

    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Hang(AttemptEvent, name="hang"):
    """a rank stopped making progress"""

    message: str = ""
    host: str = ""


@dataclass(frozen=True, kw_only=True)
class Failed(AttemptEvent, name="failed"):
    """a rank failed; with exit_code, host, log and killed if known"""

    message: str = ""
    exit_code: int | None = _omitted(None)
    host: str = _omitted("")
    log: str = _omitted("")
    killed: bool = _omitted(False)


@dataclass(frozen=True, kw_only=True)
class Finished(AttemptEvent, name="finished"):
    """the artifact is complete"""

    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cancelled(Event, name="cancelled"):
    """by `hpc-rlhf cancel`; with attempt: by `scancel`, as detected by a rank"""

    attempt: str = _omitted("")
    job_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ended(Event, name="ended"):
    """how an unfinished attempt ended; progress: it saved a new step; seen: time of its last step"""

    job_id: str | None = _omitted(None)
    reason: str = ""
    message: str = ""
    node: str = ""
    step: int = 0
    progress: bool = False
    seen: float | None = None


@dataclass(frozen=True, kw_only=True)
class Retried(Event, name="retried"):
    """resubmitted, after delay seconds, excluding the nodes in without"""

    job_id: str | None = _omitted(None)
    delay: int = 0
    without: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stopped(Event, name="stopped"):
    """no more retries; the user has to act"""

    message: str = ""


@dataclass(frozen=True, kw_only=True)
class RetryRequested(Event, name="anew"):
    """the user asked for another attempt; earlier failures no longer count"""


@dataclass(frozen=True, kw_only=True)
class Serving(Event, name="serving"):
    """`serve --slurm` submitted a job that serves the stage's model"""

    job_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Relocated(Event, name="relocated"):
    """the run was moved here from the folder `source`, or copied; jobs submitted before are not its own"""

    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Reused(Event, name="reused"):
    """the finished stage was taken from the run in the folder `source`"""

    source: str = ""


def to_json(event: Event) -> dict[str, Any]:
    """The event as the ledger stores it."""
    facts = {
        each.name: getattr(event, each.name)
        for each in fields(event)
        if not (each.metadata.get("omitted") and getattr(event, each.name) == each.default)
    }
    return {"time": facts.pop("time"), "event": event.name, **facts}


def from_json(record: object) -> Event | None:
    """The event of a parsed line; None where this version knows no such event."""
    if not isinstance(record, dict) or not isinstance(name := record.get("event"), str) or name not in KINDS:
        return None
    kind = KINDS[name]
    facts = {}
    for each in fields(kind):
        value = record.get(each.name)
        default = each.default_factory() if callable(each.default_factory) else each.default
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        elif isinstance(default, float) and isinstance(value, int):
            value = float(value)
        if value is not None and (default is None or isinstance(value, type(default))):
            facts[each.name] = value
    return kind(**facts)


def parse(text: str) -> Iterator[Event]:
    """The events in a ledger's text, or in its tail. Skips torn lines and events of other versions."""
    for line in text.split("\n"):
        try:
            event = from_json(json.loads(line))
        except ValueError:
            continue
        if event is not None:
            yield event
