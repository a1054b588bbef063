"""Where a run's time went, computed from hand-written ledgers, random ones, and one of real ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rlhf.observe.goodput.accounting import STOPPED_BY_USER, UNKNOWN, measure
from hpc_rlhf.observe.goodput.spans import SPANS, Goodput, Spans, count_words, split_words, total
from hpc_rlhf.run.events import Event, Ready, Resumed, Started, Submitted, from_json
from hpc_rlhf.run.ledger import Ledger
from tests.ledger_events import event
from tests.train.stages import make_run, run_stage, tiny_spec


def at(time: float, name: str, attempt: str | None = None, stage: str = "sft", **fields: Any) -> Event:
    return event(name, time=time, attempt=attempt, stage=stage, **fields)


def sft(events: Sequence[Event], **known: Any) -> Goodput:
    return measure(events, {"sft": []}, **known)["sft"]


SENT = [at(0, "submitting", by="person"), at(0, "submitted", job_id="7")]
FIRST = [
    *SENT,
    at(10, "started", "7-0", job_id="7", host="node1", age=4.0),
    at(16, "ready", "7-0", step=0),
    at(26, "saved", "7-0", step=100, seconds=2.0, stall=0.5),
]
DONE = [
    at(60, "started", "7-1", job_id="7", host="node2", age=4.0),
    at(65, "resumed", "7-1", step=100),
    at(66, "ready", "7-1", step=100),
    at(86, "saved", "7-1", step=300, seconds=2.0, stall=1.0),
    at(90, "finished", "7-1", step=300),
]


def test_an_agreed_stop_loses_nothing() -> None:
    """Submitted at 0, started at 6, training from 16; stopped at 30 and saved by 33; the next attempt resumes there."""
    stopped = [
        at(30, "stopping", "7-0", step=140, reason="preempted", dropped=0.0),
        at(32, "saved", "7-0", step=140, seconds=2.0, stall=2.0),
        at(33, "requeued", "7-0", step=140, reason="preempted"),
    ]
    again = [replace(event, step=140) if isinstance(event, (Resumed, Ready)) else event for event in DONE]
    found = sft([*FIRST, *stopped, *again])
    # In work: 16-30 and 66-90, but for the stalls of half a second and of one.
    assert found.spans == Spans(
        queued=6 + 23, starting=10 + 10, productive=13.5 + 23, saving=0.5 + 3 + 1, lost=0, waiting=0
    )
    assert found.spans.wall == 90
    assert found.spans.ettr == 36.5 / 61
    (broken,) = found.interruptions
    assert (broken.reason, broken.node, broken.step, broken.time) == ("preempted", "node1", 140, 33)
    assert (broken.lost, broken.starting) == (0, 10)


def test_the_part_of_a_step_that_a_stop_discards_is_lost() -> None:
    stopped = [
        at(34, "stopping", "7-0", step=140, reason="preempted", dropped=4.0),
        at(36, "saved", "7-0", step=140, seconds=2.0, stall=2.0),
        at(37, "requeued", "7-0", step=140, reason="preempted"),
    ]
    again = [replace(event, step=140) if isinstance(event, (Resumed, Ready)) else event for event in DONE]
    found = sft([*FIRST, *stopped, *again])
    assert (found.spans.lost, found.interruptions[0].lost) == (4, 4)
    assert found.spans.productive == 13.5 + 23


def test_work_after_the_last_checkpoint_of_a_killed_attempt_is_lost() -> None:
    """The checkpoint of 100 was taken at 24, and the attempt is killed at 40."""
    ended = at(42, "ended", job_id="7", reason="killed", message="", node="node3", step=150, seen=39.0)
    failed = at(40, "failed", "7-0", message="RuntimeError: Connection closed by peer", host="node1")
    found = sft([*FIRST, failed, ended, at(42, "retried", job_id="7"), *DONE])
    assert found.spans == Spans(queued=6 + 16, starting=20, productive=8 + 23, lost=15.5, saving=1.5)
    (broken,) = found.interruptions  # which has a `failed` and an `ended`
    assert (broken.reason, broken.node, broken.step) == ("killed", "node3", 150)
    assert (broken.lost, broken.starting) == (15.5, 10)


def test_an_attempt_without_a_final_event_ends_with_its_last_step() -> None:
    """Slurm requeued the job of a lost node; the next attempt records that when it starts."""
    ended = at(60, "ended", job_id="7", reason="node failure", message="", node="node1", step=150, seen=44.0)
    found = sft([*FIRST, ended, *DONE])
    assert found.spans == Spans(queued=6 + 16, starting=10 + 6, productive=8 + 23, lost=19.5, saving=1.5)
    without = sft([*FIRST, *DONE])
    assert without.interruptions[0].reason == UNKNOWN
    assert without.spans.lost == 1.5  # all that is known of


def test_a_checkpoint_without_its_event_keeps_its_work() -> None:
    """The attempt was killed after the checkpoint's rename and before the ledger's line."""
    failed = at(40, "failed", "7-0", message="killed")
    after = [replace(event, step=150) if isinstance(event, (Resumed, Ready)) else event for event in DONE]
    assert sft([*FIRST, failed, *after]).spans.lost == 0


def test_a_damaged_checkpoint_loses_the_work_of_earlier_attempts() -> None:
    """The third attempt finds only the first of two checkpoints complete; a part of a step counts as a place."""
    second = [
        at(40, "failed", "7-0", message="killed"),
        at(50, "started", "7-1", age=0.0),
        at(55, "ready", "7-1", step=100),
        at(65, "saved", "7-1", step=100, part=2, seconds=0.0, stall=0.0),
        at(70, "saved", "7-1", step=100, part=3, seconds=0.0, stall=0.0),
        at(71, "failed", "7-1", message="killed"),
        at(80, "started", "7-2", age=0.0),
        at(81, "ready", "7-2", step=100, part=2),
        at(91, "finished", "7-2", step=300),
    ]
    found = sft([*FIRST, *second])
    assert [each.lost for each in found.interruptions] == [15.5, 5 + 1]
    assert found.spans.productive == 8 + 10 + 10


def test_unsaved_work_of_an_ended_attempt_is_lost_even_before_the_next_one() -> None:
    failed = at(40, "failed", "7-0", message="killed")
    found = sft([*FIRST, failed], queued={"sft"}, now=100)
    assert (found.spans.lost, found.spans.queued) == (15.5, 6 + 60)
    killed_as_it_stopped = [
        at(30, "stopping", "7-0", step=140, reason="preempted", dropped=0.0),
        at(35, "failed", "7-0", message="killed"),
    ]
    found = sft([*FIRST, *killed_as_it_stopped])
    assert (found.spans.lost, found.spans.saving) == (5.5, 5.5)


def test_a_running_attempt_has_lost_nothing_yet() -> None:
    found = sft(FIRST, at_work={"sft"}, now=50)
    assert found.spans == Spans(queued=6, starting=10, productive=33.5, saving=0.5)
    assert found.interruptions == ()
    assert sft(FIRST, now=50).spans.wall == 26  # but one of which nobody knows is over


def test_a_pause_without_slurm_is_not_queueing() -> None:
    """Stopped by Ctrl-C at 20, and run again at 1000."""
    events = [
        at(0, "started", "local-1", job_id=None, host="vm", age=0.0),
        at(5, "ready", "local-1", step=0),
        at(20, "stopping", "local-1", step=9, reason="stopped", dropped=0.0),
        at(21, "saved", "local-1", step=9, seconds=1.0, stall=1.0),
        at(21, "interrupted", "local-1", step=9),
        at(1000, "started", "local-2", job_id=None, host="vm", age=0.0),
        at(1005, "ready", "local-2", step=9),
        at(1010, "failed", "40", message="rank 1 was ended by SIGKILL", killed=True),
        at(1010, "ended", reason="killed", message="", node="", step=12, seen=1009.0),
        at(1040, "retried", delay=30),
        at(1041, "started", "local-3", job_id=None, host="vm", age=0.0),
        at(1044, "ready", "local-3", step=9),
        at(1050, "finished", "local-3", step=20),
    ]
    found = sft(events)
    assert found.spans == Spans(waiting=979, queued=31, starting=13, productive=21, lost=5, saving=1)
    assert [(each.reason, each.step) for each in found.interruptions] == [(STOPPED_BY_USER, 9), ("killed", 12)]
    stopped = [*events[:9], at(1012, "stopped", message="no"), at(2000, "anew"), at(2000, "retried", delay=0)]
    assert sft([*stopped, at(2005, "started", "local-3")]).spans.waiting == 979 + 990


def test_attempts_that_never_started_count() -> None:
    held = at(5, "ended", job_id="7", reason="launch failure", message="held", node="node4", step=0)
    found = sft([*SENT, held, at(5, "retried", job_id="7"), at(9, "started", "7-0", age=1.0)], at_work={"sft"}, now=9)
    (broken,) = found.interruptions
    assert (broken.reason, broken.node, broken.lost) == ("launch failure", "node4", 0)
    assert found.spans.queued == 8


def test_a_stale_attempt_and_a_second_start_after_the_end_do_not_count() -> None:
    stale = [at(70, "saved", "7-0", step=150, seconds=1.0, stall=9.0), at(71, "requeued", "7-0", step=150)]
    events = [*FIRST, at(40, "failed", "7-0", message="x"), *DONE[:3], *stale, *DONE[3:]]
    assert sft(events) == sft([*FIRST, at(40, "failed", "7-0", message="x"), *DONE])
    finished = [*FIRST, at(40, "finished", "7-0", step=120)]
    assert sft([*finished, at(40, "requeued", "7-0", step=120, reason="preempted")]) == sft(finished)


def test_a_cancelled_run_waits_for_the_user() -> None:
    saved = at(30, "saved", "7-0", step=120, seconds=0.0, stall=0.0)
    for word in ([], [at(30, "cancelled", "7-0", job_id="7")]):
        found = sft([*FIRST, at(29, "cancelled", job_id="7"), saved, *word])
        assert [each.reason for each in found.interruptions] == ["cancelled by hpc-rlhf"]
        assert (found.spans.lost, found.spans.wall) == (0, 30)
    by_hand = sft([*FIRST, at(30, "cancelled", "7-0", job_id="7"), at(90, "submitting"), at(95, "submitted")])
    assert by_hand.interruptions[0].reason == "cancelled by hand"
    assert (by_hand.spans.waiting, by_hand.spans.queued) == (60, 6 + 5)


def test_a_stage_waits_for_its_needs_and_a_run_is_the_sum_of_its_stages() -> None:
    ppo = [at(0, "submitted", stage="ppo", job_id="9"), at(100, "started", "9-0", "ppo", age=2.0)]
    found = measure([*SENT, ppo[0], *FIRST[2:], *DONE[-1:], ppo[1]], {"sft": [], "ppo": ["sft"]})
    assert (found["ppo"].spans.waiting, found["ppo"].spans.queued) == (90, 8)
    run = total(found)
    assert run.spans.wall == pytest.approx(90 + 100)
    assert run.to_dict()["productive"] == pytest.approx(found["sft"].spans.productive)


@pytest.mark.parametrize("wrong", [-3600.0, -5.0])
def test_a_clock_behind_changes_no_span(wrong: float) -> None:
    """The clock of the second attempt's node; the lines before and after are from other machines."""
    failed = at(40, "failed", "7-0", message="x")
    behind = [replace(event, time=event.time + wrong) for event in DONE]
    result, right = sft([*FIRST, failed, *behind]), sft([*FIRST, failed, *DONE])
    # Only its time in the queue is unknown.
    assert result.spans.productive == right.spans.productive
    assert (result.spans.lost, result.spans.saving) == (right.spans.lost, right.spans.saving)


DAY = 86_400.0
DAY_OFF = [pytest.param(DAY, id="ahead"), pytest.param(-DAY, id="behind")]


@pytest.mark.parametrize("wrong", DAY_OFF)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_attempt_on_a_node_whose_clock_is_a_day_off(number: int, wrong: float) -> None:
    """One of three attempts. Only its time in the queue is unknown, and no span is longer than the run."""
    third = [replace(event, time=event.time + 60, attempt="7-2") for event in DONE]
    attempts = [[*FIRST[2:], at(40, "failed", "7-0", message="x")], DONE[:-1], third]
    off = [
        [replace(event, time=event.time + wrong) for event in some] if turn == number else some
        for turn, some in enumerate(attempts)
    ]
    killed = at(90, "ended", job_id="7", reason="killed")  # and its last step was at 89, by its own clock
    right, result = (
        sft([*SENT, *some[0], *some[1], replace(killed, seen=some[1][-1].time + 3), *some[2]], now=200.0)
        for some in (attempts, off)
    )
    assert 100 < result.spans.wall <= 200
    for name in ("productive", "starting", "lost", "saving"):
        assert getattr(result.spans, name) == pytest.approx(getattr(right.spans, name), abs=5), name
    assert all(0 <= each.start <= each.end <= 200 for each in result.stretches)
    assert [each.reason for each in result.interruptions] == ["failed", "killed"]


@pytest.mark.parametrize("wrong", DAY_OFF)
def test_a_running_attempt_on_a_node_whose_clock_is_a_day_off(wrong: float) -> None:
    """Beside another stage's attempt, on a node whose clock is right."""
    beside = [
        at(12, "started", "8-0", "reward", age=2.0),
        at(15, "ready", "8-0", "reward", step=0),
        at(70, "saved", "8-0", "reward", step=9, seconds=1.0, stall=1.0),
    ]
    off = [replace(event, time=event.time + wrong) for event in FIRST[2:]]
    events = [*SENT, at(1, "submitted", stage="reward", job_id="8"), *off[:1], *beside[:2], *off[1:], beside[2]]
    found = measure(events, {"sft": [], "reward": []}, at_work=("sft", "reward"), now=100.0)
    assert found["reward"].spans == Spans(queued=9, starting=5, productive=84, saving=1)
    assert found["sft"].spans.wall == pytest.approx(100)
    assert found["sft"].spans.productive > 80


def test_a_reader_whose_clock_is_a_day_behind_changes_nothing() -> None:
    assert sft([*FIRST, *DONE], now=90.0 - DAY) == sft([*FIRST, *DONE], now=90.0)


def test_a_sentinel_on_a_node_whose_clock_is_a_day_ahead_changes_nothing() -> None:
    failed = at(40, "failed", "7-0", message="x")
    ended = [at(45, "ended", job_id="7", reason="failed"), at(46, "retried", job_id="7", delay=0)]
    ahead = [replace(event, time=event.time + DAY) for event in ended]
    result, right = (sft([*FIRST, failed, *some, *DONE]) for some in (ahead, ended))
    assert result.spans.wall == right.spans.wall
    assert result.spans.productive == right.spans.productive


KINDS = (
    "submitting", "submitted", "refused", "started", "resumed", "ready", "saved", "stopping", "hang", "requeued",
    "interrupted", "failed", "finished", "cancelled", "ended", "retried", "stopped", "anew", "unheard-of",
)  # fmt: skip
any_event = st.fixed_dictionaries(
    {"event": st.sampled_from(KINDS), "stage": st.sampled_from(("sft", "ppo")), "time": st.floats(-1e4, 1e4)},
    optional={
        "attempt": st.sampled_from(("a", "b", "c")),
        "step": st.integers(0, 5),
        "part": st.integers(0, 2),
        "seconds": st.floats(0, 50),
        "stall": st.floats(0, 50),
        "dropped": st.floats(0, 50),
        "age": st.floats(0, 50),
        "seen": st.none() | st.floats(-1e4, 1e4),
        "job_id": st.sampled_from(("7", None)),
        "reason": st.sampled_from(("preempted", "killed")),
    },
)


@settings(max_examples=300, deadline=None)
@given(st.lists(any_event, max_size=40), st.booleans(), st.booleans(), st.booleans())
def test_spans_are_never_negative_and_add_up(
    records: list[dict[str, Any]], ordered: bool, work: bool, queue: bool
) -> None:
    """For any ledger in any order; with correct clocks the spans add up to the time since submission."""
    events = [event for record in records if (event := from_json(record)) is not None]
    if ordered:
        times = sorted(event.time for event in events)
        events = [replace(event, time=time) for event, time in zip(events, times, strict=True)]
    stages = {"sft": (), "ppo": ("sft",)}
    now = max((event.time for event in events), default=0.0) + 10
    found = measure(events, stages, at_work=set(stages) if work else (), queued=set(stages) if queue else (), now=now)
    for stage, each in found.items():
        assert all(getattr(each.spans, name) >= 0 for name in SPANS)
        assert all(broken.lost >= 0 and broken.starting >= 0 for broken in each.interruptions)
        lost = sum(broken.lost for broken in each.interruptions)
        # Work that a stopping attempt discards has no interruption yet.
        assert lost <= each.spans.lost + 1e-6 if work else lost == pytest.approx(each.spans.lost)
        for name in SPANS:
            lengths = [one.end - one.start for one in each.stretches if one.span == name]
            assert sum(lengths) == pytest.approx(getattr(each.spans, name), abs=1e-6)
        ends = [one.end for one in each.stretches]
        assert all(end == one.start for end, one in zip(ends, each.stretches[1:], strict=False))
        mine = [event for event in events if event.stage == stage]
        began = next((event for event in mine if isinstance(event, (Submitted, Started))), None)
        if not ordered or began is None:
            continue
        first = began.time - (began.age if isinstance(began, Started) else 0.0)
        lasting = each.spans.wall == pytest.approx(now - first, abs=1e-6)
        assert lasting if work and queue else each.spans.wall <= now - first + 1e-6


def test_words() -> None:
    found = sft([*FIRST, at(40, "failed", "7-0", message="x"), *DONE])
    assert count_words(found.interruptions) == "1 interruption: failed"
    assert count_words((*found.interruptions * 2, *sft([*FIRST, *DONE]).interruptions)) == (
        "3 interruptions: 2 failed, unknown cause"
    )
    assert split_words(found.spans).startswith("ETTR 0.46 of 1 min 8 s in the allocation: productive 31 s, ")
    assert split_words(Spans(queued=5)) == ""


@pytest.mark.train
def test_the_ledger_of_real_ranks_accounts_for_their_time(tmp_path: Path) -> None:
    """Stopped once by a signal and run again: the spans add up, and nothing is lost."""
    run = make_run(tiny_spec(tmp_path / "run", 1, sft={"max_steps": 8}))
    run_stage(run, "sft", 1, stop_after=3)
    run_stage(run, "sft", 1)
    events = list(Ledger(run.ledger).events("sft"))
    found = sft(events)
    (broken,) = found.interruptions
    assert broken.reason == STOPPED_BY_USER
    assert broken.step >= 3
    assert [event.step for event in events if isinstance(event, Ready)] == [0, broken.step]
    began = next(event for event in events if isinstance(event, Started))
    assert found.spans.wall == pytest.approx(events[-1].time - began.time + began.age, abs=0.01)
    assert found.spans.lost < found.spans.productive  # of the step it was in
    assert 0 < began.age < found.spans.starting
