"""Where a run's time went, from its ledger: how much produced kept steps, and what interrupted it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from hpc_rlhf.observe.format import duration
from hpc_rlhf.observe.goodput.accounting import StageTime
from hpc_rlhf.observe.goodput.clocks import Clock
from hpc_rlhf.observe.goodput.spans import Goodput, Interruption, Spans
from hpc_rlhf.run.events import Event, Finished


def measure(
    events: Sequence[Event],
    needs: Mapping[str, Collection[str]],
    at_work: Collection[str] = (),
    queued: Collection[str] = (),
    now: float = 0.0,
) -> dict[str, Goodput]:
    """Where the time of each stage went.

    Clocks of machines differ, and may step. The order of the events outranks their times: the times of an attempt are
    corrected by as much as its clock is wrong, so no span is negative, and none is a day too long.

    Args:
        events: the ledger's, in the order written.
        needs: the stages that each stage waits for.
        at_work: stages with a running attempt; that of any other stage is over.
        queued: stages that will run without the user doing anything.
        now: Unix seconds up to which the time of those two is counted; that of others ends at their last event.
    """
    stages = {stage: StageTime(set(needs[stage])) for stage in needs}
    clock = Clock(events, now)
    for event, time in clock.events():
        stage = stages.get(event.stage)
        if stage is None:
            continue
        stage.take(event, time, clock)
        if isinstance(event, Finished):
            for other in stages.values():
                other.need_finished(event.stage, time)
    for name, stage in stages.items():
        stage.close(max(now, clock.now), name in at_work, name in queued)
    return {name: stage.goodput() for name, stage in stages.items()}


def total(stages: Mapping[str, Goodput]) -> Goodput:
    """The sums over a run's stages, and all their interruptions in the order of time."""
    interruptions = [each for stage in stages.values() for each in stage.interruptions]
    spans = sum((stage.spans for stage in stages.values()), Spans())
    return Goodput(spans, tuple(sorted(interruptions, key=lambda each: each.time)))


def count_words(interruptions: Sequence[Interruption]) -> str:
    """For example "3 interruptions: 2 preempted, node failure"; empty if there was none."""
    if not interruptions:
        return ""
    reasons = Counter(each.reason for each in interruptions).most_common()
    counts = ", ".join(reason if times == 1 else f"{times} {reason}" for reason, times in reasons)
    return f"{len(interruptions)} interruption{'s' * (len(interruptions) > 1)}: {counts}"


def split_words(spans: Spans) -> str:
    """Where the time went, in a sentence; empty before the first attempt."""
    if spans.ettr is None:
        return ""
    names = ("productive", "starting", "lost", "saving")
    parts = ", ".join(f"{name} {duration(getattr(spans, name))}" for name in names)
    outside = ", ".join(f"{name} {duration(getattr(spans, name))}" for name in ("queued", "waiting"))
    allocated = duration(spans.allocated)
    return f"ETTR {spans.ettr:.2f} of {allocated} in the allocation: {parts}; outside it: {outside}"
