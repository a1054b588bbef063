"""What became of a run's time, told from its ledger: how much of it made steps that were kept, and what broke the rest. Pure."""

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
    """What became of the time of each stage.

    Clocks of machines differ, and may step. The order of the events outranks their times: what an attempt writes is
    taken back or forth by as much as its clock is wrong, so no span is negative, and none a day too long.

    Args:
        events: the ledger's, in the order written.
        needs: the stages that each stage waits for.
        at_work: stages of which an attempt is at work; that of any other stage is over.
        queued: stages that are to run without another word of a person.
        now: Unix seconds until which the time of those two is counted; that of others ends at their last event.
    """
    stages = {stage: StageTime(set(needs[stage])) for stage in needs}
    clock = Clock(events, now)
    for event, time in clock.told():
        stage = stages.get(event.stage)
        if stage is None:
            continue
        stage.take(event, time, clock)
        if isinstance(event, Finished):
            for other in stages.values():
                other.let_go(event.stage, time)
    for name, stage in stages.items():
        stage.close(max(now, clock.now), name in at_work, name in queued)
    return {name: stage.goodput() for name, stage in stages.items()}


def total(stages: Mapping[str, Goodput]) -> Goodput:
    """Of a run: the sums over its stages, and the interruptions of all in the order of time."""
    broken = [each for stage in stages.values() for each in stage.interruptions]
    spans = sum((stage.spans for stage in stages.values()), Spans())
    return Goodput(spans, tuple(sorted(broken, key=lambda each: each.time)))


def count_words(interruptions: Sequence[Interruption]) -> str:
    """Such as: 3 interruptions: 2 preempted, node failure. Empty where there was none."""
    if not interruptions:
        return ""
    reasons = Counter(each.reason for each in interruptions).most_common()
    said = ", ".join(reason if times == 1 else f"{times} {reason}" for reason, times in reasons)
    return f"{len(interruptions)} interruption{'s' * (len(interruptions) > 1)}: {said}"


def split_words(spans: Spans) -> str:
    """Where the time went, in a sentence; empty before the first attempt."""
    if spans.ettr is None:
        return ""
    names = ("productive", "starting", "lost", "saving")
    parts = ", ".join(f"{name} {duration(getattr(spans, name))}" for name in names)
    outside = ", ".join(f"{name} {duration(getattr(spans, name))}" for name in ("queued", "waiting"))
    return f"ETTR {spans.ettr:.2f} of {duration(spans.allocated)} in the allocation: {parts}; outside it: {outside}"
