"""Signals set a flag, and the weightiest counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from hpc_rlhf.train.runtime.stop_signals import REASON_OF_CODE, StopFlag

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    made = StopFlag()
    made.install()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def hear(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_nothing_heard_is_no_reason(flag: StopFlag) -> None:
    assert flag.code == 0
    assert flag.code not in REASON_OF_CODE


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGUSR2, "time limit"), (signal.SIGTERM, "preempted"), (signal.SIGINT, "interrupted")],
)
def test_a_signal_sets_the_flag_and_does_nothing_else(
    flag: StopFlag, number: signal.Signals, reason: str
) -> None:
    hear(number)
    assert REASON_OF_CODE[flag.code] == reason


def test_a_lighter_signal_does_not_hide_a_weightier_one(flag: StopFlag) -> None:
    hear(signal.SIGUSR2)
    assert REASON_OF_CODE[flag.code] == "time limit"
    hear(signal.SIGTERM)
    hear(signal.SIGUSR2)
    assert REASON_OF_CODE[flag.code] == "preempted"
